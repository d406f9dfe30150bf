"""What lies in a hub, and how far a run has come, from headers and receipts alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from loratools.errors import InputError, LoratoolsError
from loratools.files import load
from loratools.hub.discover import Found, Refused, discover
from loratools.hub.receipts import RUN, receipts
from loratools.hub.remote import Held, discover_remote, headers
from loratools.hub.run import row_of
from loratools.hub.scratch import scratch
from loratools.hub.work import FAILURES, facts_of, reason_of
from loratools.reports.hub import HubListReport, HubRunReport, Listed
from loratools.storage.places import Place, parse_place, shown
from loratools.storage.remote import Remote

_AT_ONCE: Final = 8  # headers elsewhere that are read together
_LARGEST: Final = 1 << 20  # of what states a run


def listed(hub: Place, *, step: Callable[[], None] | None = None) -> HubListReport:
    """Every adapter of a hub by its header; what cannot be read has a reason. `step` is called after each place.

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
        yield from (_listed(found.name, found) for found in discover(hub))
        return
    folder, places = discover_remote(hub)
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # which wait for the network
        yield from pool.map(partial(_listed_remote, folder), places)


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
    except FAILURES as error:
        return Listed(name, reason=reason_of(error))


def status(out: Place) -> HubRunReport:
    """How far the runs into `out` have come: a row for each receipt, and the adapters that have none yet.

    InputError where no run has written there.
    """
    stated = stated_run(out)
    rows = sorted((row_of(receipt, receipt.status) for receipt in receipts(out)), key=lambda row: row.name)
    known, warnings = {row.name for row in rows}, []
    try:
        missing = tuple(name for name in names_of(stated, out) if name not in known)
    except LoratoolsError as error:  # results may outlive their hub, and credentials are not kept
        missing = ()
        warnings.append(f"what is still to do is not known: {error}")
    return HubRunReport(str(out), stated.recipe, tuple(rows), missing, tuple(warnings))


@dataclass(frozen=True)
class Stated:
    """What a run was: the hub that it read, and its recipe."""

    hub: Place
    recipe: tuple[str, ...]


def stated_run(out: Place) -> Stated:
    """What the run into `out` was; InputError where none has written there."""
    try:
        stated = json.loads((out / RUN).read_text(encoding="utf-8") if isinstance(out, Path) else _run_of(out))
        return Stated(parse_place(stated["hub"]), tuple(str(step) for step in stated["recipe"]))
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{shown(out)}: no run of `loratools hub run` has written here") from None


def _run_of(out: Remote) -> bytes:
    if (out / RUN).stat() is None:
        raise ValueError("there is none")
    return (out / RUN).read(_LARGEST)


def names_of(stated: Stated, out: Place) -> Iterator[str]:
    """The adapters of the hub that was run, as it is now; none where it is gone."""
    if isinstance(stated.hub, Remote):
        _, places = discover_remote(stated.hub, without=out if isinstance(out, Remote) else None)
        yield from (found.name for found in places if isinstance(found, Held))
    elif stated.hub.is_dir():
        found = discover(stated.hub, without=out if isinstance(out, Path) else None)
        yield from (each.name for each in found if isinstance(each, Found))
