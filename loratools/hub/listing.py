"""What lies in a hub, and how far a run has come, from headers and receipts alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from loratools.adapter import Adapter
from loratools.errors import InputError, LoratoolsError, UsageError
from loratools.files import load
from loratools.hub.discover import Found, Refused, discover, is_pack
from loratools.hub.receipts import Receipt, read_stated, receipts, work_of
from loratools.hub.remote import Held, discover_remote, headers
from loratools.hub.run import places_of, row_of, split_refused
from loratools.hub.scratch import scratch
from loratools.hub.work import FAILURES, facts_of, reason_of
from loratools.reports.hub import HubListReport, HubRunReport, Listed, Row
from loratools.storage.places import Place, parse_place, shown
from loratools.storage.remote import Remote

_AT_ONCE: Final = 8  # headers elsewhere that are read together
_STALE: Final = "of an earlier recipe, version or attempt, and not done again yet"


def listed(hub: Place, *, step: Callable[[], None] | None = None) -> HubListReport:
    """Every adapter of a hub, or of a pack, by its header; what cannot be read has a reason.

    `step` is called after each place.

    Of a hub elsewhere no more is fetched than headers and configs, and small files that have no header at their start.
    InputError where the hub cannot be read.
    """
    rows = []
    for row in _rows(hub):
        rows.append(row)
        if step is not None:
            step()
    return HubListReport(str(hub), tuple(rows))


def _rows(hub: Place) -> Iterator[Listed]:
    if isinstance(hub, Path):
        packed = is_pack(hub)
        yield from _packed(hub) if packed else (_listed(found.name, found) for found in discover(hub))
        return
    folder, places = discover_remote(hub)
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # which wait for the network
        yield from pool.map(partial(_listed_remote, folder), places)


def _packed(place: Path) -> Iterator[Listed]:
    """The adapters of a pack, each with the bytes of its own file."""
    from loratools.hub.pack import open_pack

    with open_pack(place) as pack:
        for name in pack:
            try:
                row = _facts(name, pack[name])
                yield replace(row, bytes=(place / pack.listing(name).file).stat().st_size)
            except (LoratoolsError, OSError) as error:
                yield Listed(name, reason=reason_of(error))


def _listed_remote(hub: Remote, found: Held | Refused) -> Listed:
    if isinstance(found, Refused):
        return _listed(found.name, found)
    with scratch() as folder:
        try:
            path = headers(hub, found, folder)
        except FAILURES as error:
            return Listed(found.name, reason=reason_of(error).replace(str(folder), str(hub)))
        row = _listed(found.name, Found(found.name, path))
        return replace(row, reason=row.reason.replace(str(folder), str(hub)))


def _listed(name: str, found: Found | Refused) -> Listed:
    if isinstance(found, Refused):
        return Listed(name, reason=found.reason)
    try:
        with load(found.path) as adapter:
            return _facts(name, adapter)
    except FAILURES as error:
        return Listed(name, reason=reason_of(error))


def _facts(name: str, adapter: Adapter) -> Listed:
    facts = facts_of(adapter)
    return Listed(
        name,
        facts["dialect"],
        ", ".join(facts["families"]),
        facts["targets"],
        facts["rank"],
        adapter.file_nbytes,
        facts["base_model"] or "",
    )


def status(out: Place) -> HubRunReport:
    """How far the runs into `out` have come: a row for each receipt, and the adapters that have none yet.

    What an earlier recipe or version made, and was not done again, is `stale`. InputError where no run has written
    there.
    """
    stated = stated_run(out)
    rows = [
        row_of(receipt, receipt.status) if stated.holds(receipt) else Row(receipt.name, "stale", _STALE)
        for receipt in receipts(out)
    ]
    known, warnings = {row.name for row in rows}, []
    missing: tuple[str, ...] = ()
    try:
        names, refused = names_of(stated, out)
        missing = tuple(name for name in names if name not in known)
        rows += [row for row in refused if row.name not in known]
    except LoratoolsError as error:  # results may outlive their hub, and credentials are not kept
        warnings.append(f"what is still to do is not known: {error}")
    rows.sort(key=lambda row: row.name)
    return HubRunReport(str(out), stated.recipe, tuple(rows), missing, tuple(warnings))


@dataclass(frozen=True)
class Stated:
    """What a run was: the hub that it read, its recipe, and which work is for which adapters, None for all others."""

    hub: Place
    recipe: tuple[str, ...]
    parts: Mapping[str, frozenset[str] | None]

    @property
    def only(self) -> frozenset[str] | None:
        """The adapters that runs were for; None for all."""
        chosen = [names for names in self.parts.values() if names is not None]
        return frozenset().union(*chosen) if len(chosen) == len(self.parts) else None

    def holds(self, receipt: Receipt) -> bool:
        """Whether it is of the work that its adapter is to go through, and nobody has begun that anew."""
        rest = next((work for work, names in self.parts.items() if names is None), None)
        wanted = next((work for work, names in self.parts.items() if names and receipt.name in names), rest)
        return receipt.status != "stale" and wanted in (None, work_of(receipt.recipe, receipt.version))


def stated_run(out: Place) -> Stated:
    """What the run into `out` was; InputError where none has written there."""
    try:
        stated = read_stated(out) or {}
        return Stated(parse_place(stated["hub"]), tuple(str(step) for step in stated["recipe"]), stated["parts"])
    except (UsageError, TypeError, KeyError):
        raise InputError(f"{shown(out)}: no run of `loratools hub run` has written here") from None


def names_of(stated: Stated, out: Place) -> tuple[list[str], list[Row]]:
    """The adapters of the hub that the run was for, as it is now, and those that cannot be done; none where it is gone.

    InputError for a hub that cannot be read.
    """
    if isinstance(stated.hub, Path) and not stated.hub.is_dir():
        return [], []
    _, places = places_of(stated.hub, out)
    found, refused = split_refused([p for p in places if stated.only is None or p.name in stated.only])
    return [each.name for each in found], refused
