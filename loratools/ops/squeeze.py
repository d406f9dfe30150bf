"""Lower ranks with the least error: measure, decide, apply (LoRA-Squeeze, arXiv 2602.10993)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.adapter import Adapter, entry_of
from loratools.errors import AdapterError, UnchangedError, UsageError
from loratools.files import Saved, header_room, write
from loratools.linalg.factored import balanced_factors, fits_single, is_finite, squared_distance
from loratools.linalg.inner import frobenius
from loratools.linalg.svd import Method, Truncation, blocks_of, truncate
from loratools.operators import BlockDiagonal, LowRank, Operator, sum_of
from loratools.ops.initial import AT_OTHER_RANKS, refuse_mutated
from loratools.ops.spectra import (
    base_tensor,
    fit_update,
    group_targets,
    is_finite_beside_factors,
    is_finite_update,
    low_rank_part,
    measure,
    nonfinite_error,
    stack_blocks,
    stack_factors,
)
from loratools.ops.statistics import weighed_targets
from loratools.ops.weighing import measure_weighed, truncate_weighed
from loratools.pipeline import ordered_map, worker_count
from loratools.ranks import Budget, Fixed, Limits, PerTarget, Policy, Spectrum, allocate
from loratools.reports.squeeze import Outcome, SqueezeReport, TargetChange, summarise

if TYPE_CHECKING:
    from loratools.adapter import Entry
    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update
    from loratools.formats import ScaleMode
    from loratools.ops.spectra import Measured
    from loratools.ops.statistics import Statistics


_FACTORS = ("down", "up", "mid")


@dataclass(frozen=True)
class Squeeze:
    """How to squeeze, beside the ranks.

    `scale`: `fold` writes scale 1 wherever the file can say so, `keep` the scale as read. `seed` matters to the
    randomised method alone. `allow_nonfinite` carries targets with NaN or infinity over unchanged. With `weights`, the
    statistics of what enters this adapter's targets, errors count by those inputs, for ranks and for factors alike.
    """

    method: Method = "auto"
    scale: ScaleMode = "fold"
    base: BaseWeights | None = None
    device: str = "cpu"
    seed: int = 0
    allow_nonfinite: bool = False
    allow_unchanged: bool = False
    weights: Statistics | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.method == "rsvd":
            raise UsageError("weights need exact singular values; leave the method at auto")


@dataclass(frozen=True)
class Plan:
    """Ranks decided: what changes, and what does not with the reason."""

    ranks: Mapping[str, int]
    unchanged: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def squeeze(
    adapter: Adapter, rank: int | Policy | PerTarget, *, limits: Limits = Limits(), options: Squeeze = Squeeze()
) -> tuple[Adapter, SqueezeReport]:
    """The best adapter of lower rank, in memory, with what it costs.

    Each target gets the Eckart-Young optimum at its rank, with balanced factors in the stored dtypes; with weights, the
    optimum of the error that its inputs see. A target whose
    rank is not above the chosen one is carried over as it is. Raises UnchangedError where that holds for all,
    NeedsBaseError for DoRA without a base, AdapterError for NaN; ranks and errors are those of the deltas.
    """
    adapter.require_weights()
    changed = adapter.recorded("squeeze", arguments(rank, limits, options))
    plan = decide(changed, rank, limits=limits, options=options)
    updates: dict[str, Update] = {}
    outcomes = []
    for outcome, update in apply(changed, plan, options):
        updates[outcome.target] = update
        outcomes.append(outcome)
    result = changed.with_updates(updates)
    warnings = (*adapter.warnings, *plan.warnings)
    report = summarise(
        outcomes, plan.unchanged, bytes_before=adapter.nbytes, bytes_after=result.nbytes, warnings=warnings
    )
    return result, report


def squeeze_file(
    adapter: Adapter,
    path: str | os.PathLike[str],
    rank: int | Policy | PerTarget,
    *,
    limits: Limits = Limits(),
    options: Squeeze = Squeeze(),
    force: bool = False,
) -> tuple[Saved, SqueezeReport]:
    """As `squeeze`, streamed to `path` in the adapter's dialect, in the same memory whatever the adapter's size."""
    adapter.require_weights()
    changed = adapter.recorded("squeeze", arguments(rank, limits, options))
    plan = decide(changed, rank, limits=limits, options=options)
    return stream(changed, plan.unchanged, apply(changed, plan, options), path, warnings=plan.warnings, force=force)


def stream(
    adapter: Adapter,
    unchanged: Mapping[str, str],
    changes: Iterator[tuple[Outcome, Update]],
    path: str | os.PathLike[str],
    *,
    warnings: tuple[str, ...],
    force: bool,
) -> tuple[Saved, SqueezeReport]:
    """Write changed targets as they come, then the unchanged ones, and report on both."""
    outcomes: list[Outcome] = []

    def updates() -> Iterator[tuple[str, Update]]:
        for outcome, update in changes:
            outcomes.append(outcome)
            yield outcome.target, update
        for target in unchanged:
            if target in adapter.entries:
                yield target, adapter[target]

    saved = write(adapter, updates(), Path(path), force=force)
    before = adapter.file_nbytes
    notes = (*adapter.warnings, *warnings)
    report = summarise(
        outcomes, unchanged, bytes_before=before, bytes_after=saved.nbytes, warnings=notes, output=str(saved.path)
    )
    return saved, report


def arguments(rank: int | Policy | PerTarget, limits: Limits, options: Squeeze) -> dict[str, object]:
    """The choices that shape the output, as the record states them."""
    policy = Fixed(rank) if isinstance(rank, int) else rank
    fields: dict[str, object] = {"policy": repr(policy), "method": options.method}
    fields |= {"scale": options.scale, "seed": options.seed}
    if options.weights is not None:
        fields["weights"] = {"tokens": options.weights.tokens}
    return fields if limits == Limits() else fields | {"limits": repr(limits)}


def decide(
    adapter: Adapter, rank: int | Policy | PerTarget, *, limits: Limits = Limits(), options: Squeeze = Squeeze()
) -> Plan:
    """One rank for each target that gets a lower one. Raises UnchangedError where none does."""
    if isinstance(rank, bool) or not isinstance(rank, int | Policy | PerTarget):
        raise UsageError(f"a rank is a whole number or a policy such as Energy(0.9), not {rank!r}")
    refuse_mutated(adapter, AT_OTHER_RANKS)
    if options.weights is not None:
        weighed_targets(adapter)
    policy = Fixed(rank) if isinstance(rank, int) else rank
    if isinstance(policy, PerTarget) and (unknown := [t for t in policy.exceptions if t not in adapter.entries]):
        raise UsageError(f"a rank of its own is given to {unknown[0]}, which the adapter does not have")
    warnings: list[str] = []
    unchanged = dict(adapter.unsupported) | unsqueezable(adapter)
    targets = [t for t in adapter.entries if t not in unchanged]
    if isinstance(policy, Fixed) and limits == Limits():
        wanted = {t: whole_steps(adapter.entries[t], policy.value, policy) for t in targets}
        measured = _measured(adapter, targets, replace(options, allow_nonfinite=True))
        bad = [m.target for m in measured if not m.blocks] if options.allow_nonfinite else []
    else:
        wanted, bad, note = _allocate(adapter, targets, policy, limits, options)
        warnings += note
    unchanged |= dict.fromkeys(bad, "holds NaN or infinity")
    ranks = {}
    for target, entry in adapter.entries.items():
        if target in unchanged:
            continue
        if wanted[target] >= entry.rank and not (isinstance(policy, Budget) and _shrinks_when_fitted(entry)):
            unchanged[target] = not_above(entry, wanted[target])
        else:
            ranks[target] = min(wanted[target], entry.largest_rank)
    if not ranks and not options.allow_unchanged:
        first = next(iter(unchanged.items()), ("the adapter", "it holds no update"))
        raise UnchangedError(
            f"nothing to squeeze in {len(unchanged)} targets ({first[0]}: {first[1]}); "
            "choose a lower rank, or pass --allow-unchanged"
        )
    return Plan(ranks, unchanged, tuple(warnings))


def unsqueezable(adapter: Adapter) -> dict[str, str]:
    """Targets without ranks to lower, with the reason and the remedy."""
    reason = "has no ranks to lower; `loratools convert` makes a LoRA of it"
    return {t: f"{e.family.family} {reason}" for t, e in adapter.entries.items() if not e.is_factored}


def not_above(entry: Entry, rank: int) -> str:
    """Why a target is carried over that has no more than the chosen rank."""
    return f"rank {entry.rank} is not above the chosen {rank}"


def _shrinks_when_fitted(entry: Entry) -> bool:
    """Whether fitted factors of the same rank take fewer bytes: a budget counts those, a Tucker core may take more."""
    stored = sum(spec.nbytes for slot, spec in entry.specs.items() if slot in _FACTORS)
    return entry.rank <= entry.largest_rank and stored > entry.rank * entry.bytes_per_rank


def whole_steps(entry: Entry, rank: int, policy: Policy, maximum: int | None = None) -> int:
    """`rank` as whole steps of the target: down for a rank, a budget or a maximum, else up; at least one."""
    step = entry.rank_step
    steps = rank // step if isinstance(policy, Fixed | Budget) else -(-rank // step)
    steps = steps if maximum is None else min(steps, maximum // step)
    return min(max(1, steps) * step, max(rank, entry.rank))


def spectrum_of(entry: Entry, blocks: Sequence[Sequence[float]], base_norm: float | None = None) -> Spectrum:
    """The measured `blocks` of a factored target as ranks count them: one value for each rank, and what it costs."""
    step = entry.rank_step
    assert entry.base_shape is not None  # of a factored family it is known
    rows, cols = entry.base_shape[0], math.prod(entry.base_shape[1:])
    pooled = Spectrum.pooled(blocks, 1, rows=rows, cols=cols).values
    values = tuple(v / math.sqrt(step) for v in pooled for _ in range(step))
    cost = entry.bytes_per_rank
    fixed = (step - 1) * cost  # a budget for less than one step buys a whole one
    return Spectrum(values[: entry.rank], cost, rows=rows, cols=cols, fixed_cost=fixed, base_norm=base_norm)


def bytes_at(entry: Entry, rank: int) -> int:
    """Bytes of a factored target's tensors once it is fitted at `rank`."""
    return rank * entry.bytes_per_rank + _fixed_bytes(entry)


def _fixed_bytes(entry: Entry) -> int:
    """Bytes of what a rank does not change: biases and magnitudes."""
    return sum(spec.nbytes for slot, spec in entry.specs.items() if slot not in _FACTORS)


def _allocate(
    adapter: Adapter, targets: list[str], policy: Policy | PerTarget, limits: Limits, options: Squeeze
) -> tuple[dict[str, int], list[str], list[str]]:
    """Measured spectra put to the policy; with the targets that hold NaN, and what to warn of."""
    spectra: dict[str, Spectrum] = {}
    bad: list[str] = []
    relative_to_base = isinstance(policy, Budget) and policy.relative_to == "base"
    if relative_to_base and options.weights is not None:
        raise UsageError("weighted errors cannot be relative to the base's weights, which are not weighed")
    for m in _measured(adapter, targets, options):
        entry = adapter.entries[m.target]
        if not m.blocks:
            bad.append(m.target)
            continue
        norm = None
        if relative_to_base:
            if options.base is None:
                raise UsageError("errors relative to the base weights need --base")
            norm = float(options.base.find(adapter.format.parameter(m.target), entry.base_shape).double().norm())
        spectra[m.target] = spectrum_of(entry, m.blocks, norm)
    if isinstance(policy, Budget) and spectra:
        first = next(iter(spectra))  # which one bears the bytes that no rank changes does not matter
        fixed = spectra[first].fixed_cost + overhead(adapter, set(spectra))
        spectra[first] = replace(spectra[first], fixed_cost=fixed)
    allocation = allocate(spectra, policy, limits)
    notes = []
    if allocation.optimality_gap > 1e-9 * max(allocation.squared_error, 1e-300):
        notes.append(f"the budget's squared error is within {allocation.optimality_gap:.3g} of the least possible")
    rules = {t: policy.of(t) if isinstance(policy, PerTarget) else policy for t in allocation.ranks}
    ranks = {t: whole_steps(adapter.entries[t], k, rules[t], limits.maximum) for t, k in allocation.ranks.items()}
    return ranks, bad, notes


def _measured(adapter: Adapter, targets: list[str], options: Squeeze) -> Iterator[Measured]:
    """The spectra that the ranks are chosen by."""
    base, device, lenient = options.base, options.device, options.allow_nonfinite
    if options.weights is None:
        return measure(adapter, targets, base=base, device=device, allow_nonfinite=lenient)
    return measure_weighed(adapter, targets, options.weights, base=base, device=device, allow_nonfinite=lenient)


def overhead(adapter: Adapter, squeezable: set[str]) -> int:
    """Bytes of the written file that no choice of ranks changes."""
    fixed = header_room(adapter) + sum(extra.spec.nbytes for extra in adapter.extras.values())
    declared = adapter.format.declare(adapter.written(), adapter.metadata)
    fixed += sum(max(spec.nbytes, 4) for _, spec in declared.scalars.values())  # float32 where a new alpha needs it
    for target, entry in adapter.entries.items():
        fixed += _fixed_bytes(entry) if target in squeezable else entry.nbytes
    return fixed


def apply(adapter: Adapter, plan: Plan, options: Squeeze) -> Iterator[tuple[Outcome, Update]]:
    """Squeeze the planned targets, several at a time, in batches of equal shape."""
    targets = list(plan.ranks)
    batched = options.method != "rsvd" and options.weights is None
    groups = group_targets(adapter, targets, options.device, rank=plan.ranks.__getitem__)

    def work(batch: list[str]) -> list[tuple[Outcome, Update]]:
        rank = plan.ranks[batch[0]]
        if batched and not adapter.entries[batch[0]].needs_base:
            done = _squeeze_batch(adapter, batch, rank, options)
            if done is not None:
                return done
        return [_squeeze_one(adapter, target, rank, options) for target in batch]

    for results in ordered_map(work, groups, workers=worker_count(options.device, adapter.nbytes)):
        yield from results


def _squeeze_batch(
    adapter: Adapter, batch: list[str], rank: int, options: Squeeze
) -> list[tuple[Outcome, Update]] | None:
    """All targets of one shape at once, by Gram matrices; None where that is not the way for them."""
    entry = adapter.entries[batch[0]]
    updates = [adapter[target] for target in batch]
    parts = [low_rank_part(update) for update in updates]
    block_rank = rank // entry.rank_step
    stacked = stack_blocks(parts, options.device, single=True)
    if stacked is not None and stacked[0].is_single and not fits_single(stacked[0]):
        stacked = stack_blocks(parts, options.device)
    if stacked is None:
        return None
    f, per_part = stacked
    if not bool((finite := is_finite(f)).all()):
        raise nonfinite_error(batch[int(finite.logical_not().nonzero()[0]) // per_part])
    if bad := [t for t, u in zip(batch, updates, strict=True) if not is_finite_beside_factors(u)]:
        raise nonfinite_error(bad[0])
    best = balanced_factors(f, block_rank)
    fitted = []
    for i, (target, update) in enumerate(zip(batch, updates, strict=True)):
        scale = adapter.format.writable_scale(target, rank, update.scale, options.scale)
        lows = [LowRank(best.up[j], best.down[j]) for j in range(i * per_part, (i + 1) * per_part)]
        part: Operator = lows[0] if per_part == 1 else BlockDiagonal(tuple(lows))
        fitted.append(fit_update(update, part, target=target, scale=scale, base=None))
    stored = [block for update in fitted for block in blocks_of(low_rank_part(update)) if isinstance(block, LowRank)]
    distance, norm = squared_distance(f, *stack_factors(stored, options.device, f.left.dtype))
    squares = best.spectrum.square()
    kept = squares[:, :block_rank].sum(1)
    rows = torch.stack([distance, norm, kept, squares.sum(1)]).reshape(4, -1, per_part).sum(2).tolist()
    return [
        (_outcome(adapter, target, new, *(row[i] for row in rows)), new)
        for i, (target, new) in enumerate(zip(batch, fitted, strict=True))
    ]


def _squeeze_one(adapter: Adapter, target: str, rank: int, options: Squeeze) -> tuple[Outcome, Update]:
    """Any family and structure, one target at a time."""
    entry, update = adapter.entries[target], adapter[target]
    base = base_tensor(adapter, target, entry, options.base)
    if not is_finite_update(update):
        raise nonfinite_error(target)
    part = low_rank_part(update, base).to(torch.float64, options.device)
    step = entry.rank_step
    best: Truncation
    if options.weights is None:
        best = truncate(part, rank // step, method=options.method, seed=options.seed)
    else:
        best = truncate_weighed(part, rank, options.weights.moment_of(target, update))
    scale = adapter.format.writable_scale(target, rank, update.scale, options.scale)
    new = fit_update(update, best.operator, target=target, scale=scale, base=base)
    delta = update.operator(base).to(torch.float64, options.device)
    stored = new.operator(base).to(torch.float64, options.device)
    norm, distance = frobenius(delta) ** 2, frobenius(sum_of([delta, -stored])) ** 2
    kept = math.fsum(float(s[: rank // step].square().sum()) for s in best.spectra)
    total = math.fsum(float(s.square().sum()) for s in best.spectra) if best.complete else frobenius(part) ** 2
    lost = None if options.weights is None else float(best.spectra[0][rank:].square().sum())
    return _outcome(adapter, target, new, distance, norm, kept, total, lost), new


def _outcome(
    adapter: Adapter,
    target: str,
    new: Update,
    distance: float,
    norm: float,
    kept: float,
    total: float,
    lost: float | None = None,
) -> Outcome:
    """`kept` and `total` are squares of singular values; so is `lost`, where they are weighted."""
    before, after = adapter.entries[target], entry_of(new)
    if not math.isfinite(distance) or not math.isfinite(norm):
        raise AdapterError(f"{target}: its norm overflows float64")
    distance = max(0.0, distance)
    share = min(1.0, kept / total) if total else 1.0
    error = math.sqrt(distance / norm) if norm else 0.0
    if lost is None:
        change = TargetChange(before.rank, after.rank, share, error, before.nbytes, after.nbytes)
        return Outcome(target, change, norm, distance, share * norm)
    weighted = math.sqrt(lost / total) if total else 0.0
    change = TargetChange(before.rank, after.rank, share, error, before.nbytes, after.nbytes, weighted)
    return Outcome(target, change, norm, distance, share * norm, total, lost)
