"""An adapter out of a pack, in the dialect that it had."""

from __future__ import annotations

from pathlib import Path

from loratools.files import check_destination, save
from loratools.hub.pack.reader import Pack
from loratools.reports.pack import UnpackReport


def unpack(path: Path, name: str, out: Path, *, force: bool = False) -> UnpackReport:
    """Write one adapter of the pack at `path` to `out`, as an ordinary adapter in its own dialect.

    What was stored as it is, and every field of its config and metadata but those that state ranks and alphas, are what
    they were. Raises UsageError for a name that the pack does not hold, OutputError where `out` exists and `force`
    is not given.
    """
    with Pack(path) as pack:
        listing = pack.listing(name)
        with pack[name] as adapter:
            check_destination(adapter, out, force=force)
            saved = save(adapter, out, force=force)
            size = saved.nbytes + (saved.config.stat().st_size if saved.config else 0)
            ranks = [entry.rank for entry in adapter.entries.values()]
            return UnpackReport(
                str(saved.path),
                name,
                adapter.format.name,
                len(ranks),
                max(ranks, default=0),
                listing.relative_error,
                size,
            )
