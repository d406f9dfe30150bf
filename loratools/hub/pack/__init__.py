"""Many adapters in one folder that share bases: packed, opened as a mapping, joined, unpacked."""

from loratools.hub.pack.join import add
from loratools.hub.pack.reader import Pack, open_pack
from loratools.hub.pack.unpack import unpack
from loratools.hub.pack.writer import Packing, pack

__all__ = ["Pack", "Packing", "add", "open_pack", "pack", "unpack"]
