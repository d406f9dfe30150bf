"""A recipe for every adapter of a hub: what is done already is left, what fails is a row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loratools._version import __version__
from loratools.errors import OutputError, UsageError
from loratools.hub.discover import Found, Refused, discover
from loratools.hub.engines import local_executor, outcomes
from loratools.hub.leftovers import clear_leftovers
from loratools.hub.only import Only
from loratools.hub.receipts import RECEIPTS, RUN, Receipt, read_receipts, read_stated, upload_place, work_of
from loratools.hub.remote import Held, discover_remote
from loratools.hub.scratch import sweep
from loratools.hub.work import Job, check_names, failed, is_fresh, process, refuse_results
from loratools.reports.hub import HubRunReport, Row
from loratools.storage.places import Place, check_output, put_whole, shown
from loratools.storage.remote import Remote

if TYPE_CHECKING:
    from loratools.hub.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """How to go about it.

    `workers`: processes of this machine, or with an `executor` jobs in its hands at a time. `shard` (i, n): the i-th of
    n parts, 1 to n, as names fall into them. `resume`: leave what an earlier run did; `force`: do all of it again.
    `only`: some adapters of the hub, all where it is None.
    """

    workers: int = 1
    shard: tuple[int, int] = (1, 1)
    resume: bool = False
    force: bool = False
    executor: Callable[[], Executor] | None = None
    only: Only | None = None

    def __post_init__(self) -> None:
        index, count = self.shard
        if self.workers < 1 or not 1 <= index <= count:
            raise UsageError(
                f"{self.workers} workers, part {index} of {count}: give at least 1 of each, and no part above"
            )


def run(
    recipe: Recipe,
    hub: Place,
    out: Place,
    how: Run = Run(),
    *,
    steps: Callable[[int, str], Callable[[], None]] | None = None,
) -> HubRunReport:
    """Every adapter of `hub` through `recipe` into `out`, with a receipt each; a failure is a row with its reason.

    Outputs appear whole or not at all, whenever it is stopped; the same again with `resume` does what is missing,
    changed or stale, and ends with the same bytes. Raises InputError for a hub that cannot be read, UsageError where
    `out` holds results and neither `resume` nor `force` is given, or the hub has not all that `how.only` names.
    """
    check_output(out)
    if _is_same(hub, out):
        raise UsageError(f"{shown(out)}: is the hub itself; write elsewhere")
    folder, places = places_of(hub, out)
    if how.only is not None:
        places = how.only.chosen(places, shown(hub))
    refuse_results(out, resume=how.resume, force=how.force)
    found, refused = split_refused(places)
    rows = [row for row in refused if _is_mine(row.name, how.shard)]
    mine = [
        Job(f.name, f.stem, folder, out, recipe, f.files if isinstance(f, Held) else {})
        for f in found
        if _is_mine(f.name, how.shard)
    ]
    step = steps(len(mine), "adapters") if steps else lambda: None
    _state(out, recipe, hub, None if how.only is None else [place.name for place in places])
    if isinstance(out, Path):
        clear_leftovers(out, (job.stem for job in mine))
    kept: set[str] = set()
    for receipt in _fresh(mine, out) if how.resume and not how.force else ():
        kept.add(receipt.name)
        rows.append(row_of(receipt, "kept"))
        step()
    todo = [job for job in mine if job.name not in kept]
    make = how.executor or (lambda: local_executor(min(how.workers, max(1, len(todo)))))
    if any(isinstance(place, Remote) and place.protocol == "memory" for place in (hub, out)):
        make = partial(ThreadPoolExecutor, 1)  # other processes have memories of their own
    if any(isinstance(place, Remote) for place in (hub, out)):
        sweep()
    if todo:
        for receipt in outcomes(make, process, todo, workers=how.workers, given_up=_given_up):
            rows.append(row_of(receipt, receipt.status))
            step()
        if isinstance(out, Path):
            clear_leftovers(out, (job.stem for job in todo))  # of workers that died
    rows.sort(key=lambda row: row.name)
    return HubRunReport(str(out), tuple(recipe.spelt()), tuple(rows))


def _is_same(hub: Place, out: Place) -> bool:
    if isinstance(hub, Path) and isinstance(out, Path):
        return hub.resolve() == out.resolve()
    return isinstance(hub, Remote) and isinstance(out, Remote) and hub.url == out.url


def places_of(hub: Place, out: Place) -> tuple[Place, list[Found | Held | Refused]]:
    """The folder of a hub, and everything in it that could be an adapter, but for what lies in `out`."""
    if isinstance(hub, Path):
        return hub, list(discover(hub, without=out if isinstance(out, Path) else None))
    folder, places = discover_remote(hub, without=out if isinstance(out, Remote) else None)
    return folder, [*places]


def split_refused(places: Sequence[Found | Held | Refused]) -> tuple[list[Found | Held], list[Row]]:
    """What there is to do, and a row for each that cannot be done, whatever it holds."""
    found = [place for place in places if not isinstance(place, Refused)]
    clashes = check_names(found)
    rows = [Row(place.name, "failed", place.reason) for place in places if isinstance(place, Refused)]
    rows += [
        Row(name, "failed", f"its output would lie where that of {other} does; rename one")
        for name, other in clashes.items()
    ]
    return [place for place in found if place.name not in clashes], rows


def _fresh(jobs: list[Job], out: Place) -> Iterator[Receipt]:
    """The receipts of what an earlier run did, and nothing has changed since; one at a time in memory."""
    there = out.listing() if isinstance(out, Remote) else {}
    known = [job for job in jobs if isinstance(out, Path) or f"{RECEIPTS}/{job.stem}.json" in there]
    found = zip(known, read_receipts(out, [job.stem for job in known]), strict=True)
    yield from (receipt for job, receipt in found if receipt is not None and is_fresh(job, receipt, there))


def _given_up(job: Job, reason: str) -> Receipt:
    receipt = failed(job, reason)
    with suppress(OutputError):  # it may be what the reason is about
        receipt.save(job.out, job.stem)
    return receipt


def row_of(receipt: Receipt, status: str) -> Row:
    """What a receipt says, in a row."""
    return Row(
        receipt.name,
        status,
        receipt.reason,
        receipt.bytes_before,
        receipt.bytes_after,
        receipt.relative_error,
        receipt.seconds,
        len(receipt.warnings),
    )


def _is_mine(name: str, shard: tuple[int, int]) -> bool:
    index, count = shard
    return (
        int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") % count == index - 1
    )


def _state(out: Place, recipe: Recipe, hub: Place, only: list[str] | None) -> None:
    """What the run is, for `status`; the same for all shards. Of a URL, what may be known of it.

    `only` are the adapters that it is for; others are left to what earlier runs into `out` stated.
    """
    where = str(hub.absolute() if isinstance(hub, Path) else hub)
    work = work_of(recipe.digest, __version__)
    parts: dict[str, list[str] | None] = {work: None}
    if only is not None:
        earlier = read_stated(out) or {}
        known = earlier.get("parts", {}) if earlier.get("hub") == where else {}
        others = {key: None if names is None else sorted(names.difference(only)) for key, names in known.items()}
        parts = {key: names for key, names in others.items() if names != []}
        if (mine := parts.get(work, [])) is not None:
            parts[work] = sorted({*only, *mine})
    stated = {"version": __version__, "recipe": recipe.spelt(), "digest": recipe.digest, "hub": where, "parts": parts}
    put_whole(out / RUN, json.dumps(stated, sort_keys=True, indent=1).encode(), upload_place(out, ""))
