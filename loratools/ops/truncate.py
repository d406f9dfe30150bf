"""Keep the first components as trained, with the scale rule of the method that ordered them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loratools.adapter import Adapter, entry_of
from loratools.errors import AdapterError, UnchangedError, UsageError
from loratools.families.base import LowRankUpdate
from loratools.linalg.factored import squared_distance
from loratools.ops.initial import AT_OTHER_RANKS, refuse_mutated
from loratools.ops.spectra import is_finite_update, low_rank_part, nonfinite_error, stack_blocks
from loratools.ops.squeeze import Plan, stream, unsqueezable
from loratools.pipeline import ordered_map, worker_count
from loratools.reports.squeeze import Outcome, SqueezeReport, TargetChange, summarise

if TYPE_CHECKING:
    from loratools.families.base import Update
    from loratools.files import Saved
    from loratools.formats import NestedScaling

Nested = Literal["dylora", "matryoshka", "keep"]


def truncate(
    adapter: Adapter,
    rank: int,
    *,
    nested: Nested = "keep",
    scaling: NestedScaling | None = None,
    allow_unchanged: bool = False,
) -> tuple[Adapter, SqueezeReport]:
    """The first `rank` components of every target, in memory; slices bit for bit, wherever a file can state the scale.

    `nested` sets the scale of what is kept: `keep` the one it had, `dylora` alpha / rank (arXiv 2210.07558),
    `matryoshka` the one that `scaling` gives each rank (arXiv 2605.07850). `energy_kept` is the squared cosine between
    the delta and what is kept, which for an SVD is the energy. Raises UnchangedError where no target has more of them.
    """
    changed = adapter.recorded("truncate", {"rank": rank, "nested": nested, "scaling": scaling})
    plan = _decide(changed, rank, allow_unchanged=allow_unchanged)
    updates: dict[str, Update] = {}
    outcomes = []
    for outcome, update in _apply(changed, plan, nested, scaling):
        updates[outcome.target] = update
        outcomes.append(outcome)
    result = changed.with_updates(updates)
    report = summarise(
        outcomes, plan.unchanged, bytes_before=adapter.nbytes, bytes_after=result.nbytes, warnings=adapter.warnings
    )
    return result, report


def truncate_file(
    adapter: Adapter,
    path: str | os.PathLike[str],
    rank: int,
    *,
    nested: Nested = "keep",
    scaling: NestedScaling | None = None,
    allow_unchanged: bool = False,
    force: bool = False,
) -> tuple[Saved, SqueezeReport]:
    """As `truncate`, streamed to `path` in the adapter's dialect."""
    changed = adapter.recorded("truncate", {"rank": rank, "nested": nested, "scaling": scaling})
    plan = _decide(changed, rank, allow_unchanged=allow_unchanged)
    return stream(changed, plan.unchanged, _apply(changed, plan, nested, scaling), Path(path), warnings=(), force=force)


def _decide(adapter: Adapter, rank: int, *, allow_unchanged: bool) -> Plan:
    if rank < 1:
        raise UsageError(f"rank {rank} is below 1")
    adapter.require_weights()
    refuse_mutated(adapter, AT_OTHER_RANKS)
    unchanged = dict(adapter.unsupported) | unsqueezable(adapter)
    ranks = {}
    for target, entry in adapter.entries.items():
        if target in unchanged:
            continue
        if rank >= entry.rank:
            unchanged[target] = f"rank {entry.rank} is not above {rank}"
        else:
            ranks[target] = rank
    if not ranks and not allow_unchanged:
        raise UnchangedError(
            f"no target has more than {rank} components; choose a lower rank, or pass --allow-unchanged"
        )
    return Plan(ranks, unchanged)


def _rank_factor(nested: Nested, scaling: NestedScaling | None, before: int, after: int) -> float:
    """What the method multiplies the scale by on the way from rank `before` to rank `after`."""
    if nested == "keep":
        return 1.0
    if nested == "dylora":
        return before / after
    if scaling is None:
        raise UsageError("how MatryoshkaLoRA scaled each rank is not in the file: pass --scaling none, rank or sqrt")
    return {"none": 1.0, "rank": before / after, "sqrt": math.sqrt(before / after)}[scaling]


def _apply(
    adapter: Adapter, plan: Plan, nested: Nested, scaling: NestedScaling | None
) -> Iterator[tuple[Outcome, Update]]:
    known = scaling or adapter.format.nested_scaling

    def work(target: str) -> tuple[Outcome, Update]:
        entry, rank = adapter.entries[target], plan.ranks[target]
        delta_scale = entry.scale * _rank_factor(nested, known, entry.rank, rank)
        scale = adapter.format.writable_scale(target, rank, delta_scale, "keep")
        update = entry.read()
        assert isinstance(update, LowRankUpdate)
        if not is_finite_update(update):
            raise nonfinite_error(target, "squeeze with --allow-nonfinite")
        try:
            new = update.prefix(rank, delta_scale=delta_scale, scale=scale)
        except AdapterError as error:
            raise type(error)(f"{target}: {error}") from error
        return _compare(target, update, new), new

    yield from ordered_map(work, plan.ranks, workers=worker_count("cpu", adapter.nbytes))


def _compare(target: str, before: Update, after: Update) -> Outcome:
    old, new = (stack_blocks([low_rank_part(update)], "cpu") for update in (before, after))
    assert old is not None
    assert new is not None
    distances, norms = squared_distance(old[0], new[0].left, new[0].right)
    distance, norm = max(0.0, float(distances.sum())), float(norms.sum())
    kept = float((new[0].left_gram * new[0].right_gram).sum())
    cross = (norm + kept - distance) / 2
    share = min(1.0, cross * cross / (norm * kept)) if norm and kept else float(norm == 0.0)
    error = math.sqrt(distance / norm) if norm else 0.0
    a, b = entry_of(before), entry_of(after)
    change = TargetChange(a.rank, b.rank, share, error, a.nbytes, b.nbytes)
    return Outcome(target, change, norm, distance, share * norm)
