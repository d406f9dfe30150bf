"""What lies in a hub, and how far a run has come, from headers and receipts alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
    try:
        stated = json.loads((out / FOLDER / "run.json").read_text(encoding="utf-8"))
        hub, recipe = Path(stated["hub"]), tuple(str(step) for step in stated["recipe"])
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{printable(out)}: no run of `loratools hub run` has written here") from None
    rows = sorted((row_of(receipt, receipt.status) for receipt in receipts(out)), key=lambda row: row.name)
    known = {row.name for row in rows}
    return HubRunReport(str(out), recipe, tuple(rows), tuple(name for name in _names(hub, out) if name not in known))


def _names(hub: Path, out: Path) -> Iterator[str]:
    if hub.is_dir():
        yield from (found.name for found in discover(hub, without=out) if isinstance(found, Found))
