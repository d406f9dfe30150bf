"""What lies in a hub, and how far a run has come, from headers and receipts alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import InputError, LoratoolsError
from loratools.files import load
from loratools.hub.discover import Found, Refused, discover
from loratools.hub.receipts import FOLDER, receipts
from loratools.hub.run import row_of
from loratools.hub.work import facts_of
from loratools.reports.hub import HubListReport, HubRunReport, Listed
from loratools.storage.atomic import printable


def listed(hub: Path, *, step: Callable[[], None] | None = None) -> HubListReport:
    """Every adapter of a hub by its header; what cannot be read has a reason. `step` is called after each place.

    InputError where the hub cannot be read.
    """
    rows = []
    for found in discover(hub):
        rows.append(_listed(found))
        if step is not None:
            step()
    return HubListReport(str(hub), tuple(rows))


def _listed(found: Found | Refused) -> Listed:
    if isinstance(found, Refused):
        return Listed(found.name, reason=found.reason)
    try:
        with load(found.path) as adapter:
            facts = facts_of(adapter)
            return Listed(
                found.name,
                facts["dialect"],
                ", ".join(facts["families"]),
                facts["targets"],
                facts["rank"],
                adapter.file_nbytes,
                facts["base_model"] or "",
            )
    except (LoratoolsError, OSError) as error:
        return Listed(found.name, reason=" ".join(str(error).split()))


def status(out: Path) -> HubRunReport:
    """How far the runs into `out` have come: a row for each receipt, and the adapters that have none yet.

    InputError where no run has written there.
    """
    stated = stated_run(out)
    rows = sorted((row_of(receipt, receipt.status) for receipt in receipts(out)), key=lambda row: row.name)
    known = {row.name for row in rows}
    missing = tuple(name for name in names_of(stated, out) if name not in known)
    return HubRunReport(str(out), stated.recipe, tuple(rows), missing)


@dataclass(frozen=True)
class Stated:
    """What a run was: the hub that it read, and its recipe."""

    hub: Path
    recipe: tuple[str, ...]


def stated_run(out: Path) -> Stated:
    """What the run into `out` was; InputError where none has written there."""
    try:
        stated = json.loads((out / FOLDER / "run.json").read_text(encoding="utf-8"))
        return Stated(Path(stated["hub"]), tuple(str(step) for step in stated["recipe"]))
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{printable(out)}: no run of `loratools hub run` has written here") from None


def names_of(stated: Stated, out: Path) -> Iterator[str]:
    """The adapters of the hub that was run, as it is now; none where it is gone."""
    if stated.hub.is_dir():
        yield from (found.name for found in discover(stated.hub, without=out) if isinstance(found, Found))
