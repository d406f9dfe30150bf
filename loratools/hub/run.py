"""A recipe for every adapter of a hub: what is done already is left, what fails is a row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools._version import __version__
from loratools.errors import OutputError, UsageError
from loratools.hub.discover import Found, Refused, discover
from loratools.hub.engines import local_executor, outcomes
from loratools.hub.receipts import FOLDER, Receipt, place_of, read_receipt
from loratools.hub.work import Job, check_names, failed, is_fresh, process, refuse_results
from loratools.reports.hub import HubRunReport, Row
from loratools.storage.atomic import write_whole

if TYPE_CHECKING:
    from loratools.hub.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """How to go about it.

    `workers`: processes of this machine, or with an `executor` jobs in its hands at a time. `shard` (i, n): the i-th of
    n parts, 1 to n, as names fall into them. `resume`: leave what an earlier run did; `force`: do all of it again.
    """

    workers: int = 1
    shard: tuple[int, int] = (1, 1)
    resume: bool = False
    force: bool = False
    executor: Callable[[], Executor] | None = None

    def __post_init__(self) -> None:
        index, count = self.shard
        if self.workers < 1 or not 1 <= index <= count:
            raise UsageError(
                f"{self.workers} workers, part {index} of {count}: give at least 1 of each, and no part above"
            )


def run(
    recipe: Recipe,
    hub: Path,
    out: Path,
    how: Run = Run(),
    *,
    steps: Callable[[int, str], Callable[[], None]] | None = None,
) -> HubRunReport:
    """Every adapter of `hub` through `recipe` into `out`, with a receipt each; a failure is a row with its reason.

    Outputs appear whole or not at all, whenever it is stopped; the same again with `resume` does what is missing,
    changed or stale, and ends with the same bytes. Raises InputError for a hub that cannot be read, UsageError where
    `out` holds results and neither `resume` nor `force` is given.
    """
    if hub.resolve() == out.resolve():
        raise UsageError(f"{out}: is the hub itself; write elsewhere")
    found = list(discover(hub, without=out))
    refuse_results(out, resume=how.resume, force=how.force)
    jobs = [Job(f.name, f.stem, f.path, hub, out, recipe) for f in found if isinstance(f, Found)]
    clashes = check_names(jobs)
    mine = [job for job in jobs if _is_mine(job.name, how.shard)]
    rows = [Row(f.name, "failed", f.reason) for f in found if isinstance(f, Refused) and _is_mine(f.name, how.shard)]
    rows += [
        Row(job.name, "failed", f"its output would lie where that of {clashes[job.name]} does; rename one")
        for job in mine
        if job.name in clashes
    ]
    mine = [job for job in mine if job.name not in clashes]
    step = steps(len(mine), "adapters") if steps else lambda: None
    _state(out, recipe, hub)
    fresh = [job for job in mine if how.resume and not how.force and is_fresh(job)]
    kept = {job.name for job in fresh}
    for job in fresh:
        receipt = read_receipt(place_of(out, job.stem))
        assert receipt is not None  # it was fresh a moment ago
        rows.append(row_of(receipt, "kept"))
        step()
    todo = [job for job in mine if job.name not in kept]
    make = how.executor or (lambda: local_executor(min(how.workers, max(1, len(todo)))))
    if todo:
        for receipt in outcomes(make, process, todo, workers=how.workers, given_up=_given_up):
            rows.append(row_of(receipt, receipt.status))
            step()
    rows.sort(key=lambda row: row.name)
    return HubRunReport(str(out), tuple(recipe.spelt()), tuple(rows))


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


def _state(out: Path, recipe: Recipe, hub: Path) -> None:
    """What the run is, for `status`; the same for all shards."""
    stated = {"version": __version__, "recipe": recipe.spelt(), "digest": recipe.digest, "hub": str(hub.absolute())}
    write_whole(out / FOLDER / "run.json", json.dumps(stated, sort_keys=True, indent=1).encode())
