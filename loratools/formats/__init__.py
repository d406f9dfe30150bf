"""The dialects that loratools reads and writes; exactly one must claim a file."""

from __future__ import annotations

from loratools.errors import AdapterError, InputError
from loratools.formats.adapterhub import AdapterHub
from loratools.formats.base import Declaration, Format, Header, Hints, NestedScaling, Order, Part, ScaleMode, Written
from loratools.formats.bitdelta import BitDeltaFile
from loratools.formats.bottleneck_files import Bottlenecks
from loratools.formats.comfy import Comfy
from loratools.formats.diffusers import Diffusers
from loratools.formats.gguf import Gguf
from loratools.formats.hydra import HydraFile
from loratools.formats.kohya import Kohya
from loratools.formats.litgpt import LitGPT
from loratools.formats.loldu import LoLDUFile
from loratools.formats.lora_xs import LoraXs
from loratools.formats.loralib import Loralib
from loratools.formats.mlx import Mlx
from loratools.formats.mosa import Mosa
from loratools.formats.native import Native
from loratools.formats.omi import Omi
from loratools.formats.peft import Peft
from loratools.formats.peft_methods import METHODS, PeftMethod
from loratools.formats.petl import PetlVit
from loratools.formats.qhft import Qhft
from loratools.formats.s2ft import S2FTState
from loratools.formats.salt import SaltFile
from loratools.formats.snell import SnellFile
from loratools.formats.torchtune import Torchtune
from loratools.formats.xlabs import XLabs

FORMATS: tuple[type[Format], ...] = (
    Native,
    Peft,
    PeftMethod,
    Kohya,
    Diffusers,
    Comfy,
    XLabs,
    Gguf,
    Omi,
    Mlx,
    AdapterHub,
    LitGPT,
    Torchtune,
    PetlVit,
    BitDeltaFile,
    Bottlenecks,
    Qhft,
    HydraFile,
    LoLDUFile,
    SaltFile,
    SnellFile,
    LoraXs,
    Mosa,
    S2FTState,
    Loralib,
)

__all__ = [
    "FORMATS",
    "Declaration",
    "Format",
    "Header",
    "Hints",
    "NestedScaling",
    "Order",
    "Part",
    "ScaleMode",
    "Written",
    "recognise",
    "writable_formats",
]


def recognise(header: Header) -> type[Format]:
    """The one dialect of a file; InputError shows some keys where none or several claim it."""
    if Native.recognises(header):  # it says what it is; its slots are those of other dialects
        return Native
    fits = [f for f in FORMATS if f.recognises(header)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise InputError(
            f"{header.path}: keys of more than one dialect ({', '.join(f.name for f in fits)}); split the file"
        )
    if header.config is not None and (kind := header.config.get("peft_type")):
        raise AdapterError(f"{header.path}: PEFT type {kind!r} is not supported; LORA, {', '.join(METHODS)} are")
    if not header.specs:
        raise InputError(f"{header.path}: the file holds no tensors")
    shown = ", ".join(repr(key)[1:-1][:80] for key in list(header.specs)[:5])
    remedy = "`loratools formats` lists what is read"
    raise InputError(f"{header.path}: no known adapter dialect; {remedy}; its keys begin with {shown}")


def writable_formats() -> dict[str, tuple[type[Format], ...]]:
    """The dialects that a conversion can write, by name, with the kinds of files that go by it."""
    found: dict[str, tuple[type[Format], ...]] = {}
    for dialect in FORMATS:
        if dialect.holds:
            found[dialect.name] = (*found.get(dialect.name, ()), dialect)
    return found
