"""One adapter of several: exact weighted sums, and rules that resolve interference, on deltas and never on factors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, get_args

from loratools._lazy import torch
from loratools.adapter import Adapter, Record, entry_of
from loratools.errors import AdapterError, UsageError
from loratools.families.lora import LoRA, cast_to
from loratools.linalg.inner import frobenius, inner
from loratools.linalg.svd import Truncation, blocks_of, spectrum, truncate
from loratools.operators import LowRank, Operator, sum_of
from loratools.ops.matching import flattened, matched
from loratools.ops.merge_checks import ExtrasRule, check_compatible, merged_extras, name_of
from loratools.ops.merge_methods import DENSITY, Merged, Rule, dare, knots, seed_of, ties, tsv, weighted_sum
from loratools.ops.merge_output import Job, at_rank, draft_of
from loratools.ops.spectra import base_tensor, fit_update
from loratools.ops.squeeze import overhead
from loratools.pipeline import ordered_map, worker_count
from loratools.ranks import Budget, Fixed, Limits, LocalPolicy, Policy, Spectrum, allocate
from loratools.reports.merge import MergeReport, TargetMerge, totals

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update

_SINGLE = ("sum", "knots", "tsv")  # rules that never make a dense matrix of factored deltas


@dataclass(frozen=True)
class Merge:
    """How to merge, beside the weights and the ranks.

    `density`: None stands for 0.2 (ties, knots), 0.1 (dare) and 1 / number of adapters (tsv). `seed` matters to dare
    and to the randomised SVD of large dense merges. `extras` says what becomes of tensors that are no update. `shares`
    multiplies the weights target by target, for routers that differ between layers: a number for each adapter.
    """

    method: Rule = "sum"
    density: float | None = None
    seed: int = 0
    base: BaseWeights | None = None
    device: str = "cpu"
    extras: ExtrasRule = "equal"
    shares: Mapping[str, tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Rule):
            raise UsageError(f"no method {self.method!r}; choose one of {', '.join(get_args(Rule))}")
        if self.density is not None and self.method == "sum":
            raise UsageError("a sum keeps every entry; a density needs the method ties, dare, knots or tsv")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"density {self.density} is not in (0, 1]: as the share to keep, try 0.2")


def merge(
    weighted: Sequence[tuple[Adapter, float]],
    rank: int | Policy | None = None,
    *,
    limits: Limits = Limits(),
    options: Merge = Merge(),
) -> tuple[Adapter, MergeReport]:
    """The LoRA nearest to the merge of several adapters of any families, in the dialect and dtypes of the first.

    Deltas of one module (matched by name, across dialects by the name with dots flattened) are merged by
    `options.method`; an adapter without the module counts as zero. Without a rank a sum is exact: its rank is the sum
    of ranks, less what is linearly dependent; other methods get at most the sum of ranks. Each target is the
    Eckart-Young optimum at its rank, for large dense merges within a few thousandths (a randomised SVD). Raises
    AdapterError for shapes that differ, NaN, activated LoRA and extras that differ, NeedsBaseError for DoRA without a
    base.
    """
    adapters, weights = [a for a, _ in weighted], tuple(float(w) for _, w in weighted)
    if len(adapters) < 2:
        raise UsageError("a merge needs at least two adapters; for one, use squeeze")
    if bad := [w for w in weights if not math.isfinite(w)]:
        raise UsageError(f"weight {bad[0]} is not finite")
    for adapter in adapters:
        adapter.require_weights()
    policy = Fixed(rank) if isinstance(rank, int) else rank
    if policy is None and limits != Limits():
        raise UsageError("limits on the ranks need a rule for the ranks")
    rows = matched(adapters)
    warnings = check_compatible(adapters, rows)
    extras, dropped = merged_extras(adapters, options.extras)
    draft, jobs = draft_of(adapters, rows, tuple(extras), options.base)
    if options.shares is not None:
        jobs = _shared(jobs, options.shares, len(adapters))
    draft = replace(draft, extras=extras, record=_record(adapters, weights, policy, limits, options))
    fitted = fit_jobs(draft, adapters, weights, jobs, policy, limits, options)
    merged, targets = fitted.adapter, fitted.targets
    warnings += fitted.notes
    missing = {job.name: tuple(i + 1 for i, _ in job.sources) for job in jobs if len(job.sources) < len(adapters)}
    total = totals(targets, fitted.squares, merged.nbytes)
    if missing:
        first = next(iter(missing))
        warnings.append(f"{len(missing)} targets are not in all adapters, which count as zero there; first: {first}")
    if high := [t for t, row in targets.items() if row.relative_error > 0.5]:
        warnings.append(f"the relative error is above 0.5 for {len(high)} targets at their rank; first: {high[0]}")
    return merged, MergeReport(options.method, weights, targets, missing, dropped, total, tuple(warnings))


def _shared(jobs: list[Job], shares: Mapping[str, tuple[float, ...]], count: int) -> list[Job]:
    for job in jobs:
        own = shares.get(job.name)
        if own is None or len(own) != count or not all(math.isfinite(share) for share in own):
            raise UsageError(f"{job.name}: needs {count} shares, one for each adapter, all of them finite")
    return [replace(job, shares=shares[job.name]) for job in jobs]


@dataclass(frozen=True)
class Fitted:
    """The output, a row for each target, (||error||^2, ||delta||^2) of each, and what to say of the ranks."""

    adapter: Adapter
    targets: Mapping[str, TargetMerge]
    squares: Sequence[tuple[float, float]]
    notes: Sequence[str]


def fit_jobs(
    draft: Adapter,
    adapters: Sequence[Adapter],
    weights: tuple[float, ...],
    jobs: list[Job],
    policy: Policy | None,
    limits: Limits,
    options: Merge,
) -> Fitted:
    """`draft` with the factors of every job, at the ranks that the policy chooses."""
    notes: list[str] = []
    if isinstance(policy, Budget) or (policy is not None and limits.uniform):
        jobs, notes = _allocated(draft, adapters, weights, jobs, policy, limits, options)
    workers = _workers(adapters, options)
    work = partial(_merge_one, draft, adapters, weights, policy=policy, limits=limits, options=options)
    results = list(ordered_map(work, jobs, workers=workers))
    merged = draft.with_updates({job.name: update for job, (update, _, _) in zip(jobs, results, strict=True)})
    targets = {job.name: row for job, (_, row, _) in zip(jobs, results, strict=True)}
    return Fitted(merged, targets, [squares for _, _, squares in results], notes)


def _record(
    adapters: Sequence[Adapter], weights: tuple[float, ...], policy: Policy | None, limits: Limits, options: Merge
) -> Record:
    """Its hash is that of the inputs' hashes, one a line."""

    def digest() -> str:
        lines = "\n".join(a.origin.sha256() if a.origin else "" for a in adapters)
        return hashlib.sha256(lines.encode()).hexdigest()

    fields: dict[str, object] = {"method": options.method, "weights": list(weights), "policy": repr(policy)}
    fields |= {"density": _density(options, len(adapters)), "seed": options.seed, "extras": options.extras}
    if options.shares is not None:
        stated = "\n".join(f"{target} {own}" for target, own in sorted(options.shares.items()))
        fields |= {"shares_sha256": hashlib.sha256(stated.encode()).hexdigest()}
    return Record("merge", fields if limits == Limits() else fields | {"limits": repr(limits)}, digest)


def _density(options: Merge, count: int) -> float | None:
    if options.density is not None or options.method == "sum":
        return options.density
    return DENSITY.get(options.method, 1 / count)


def _workers(adapters: Sequence[Adapter], options: Merge) -> int:
    """Dense matrices one target at a time: each takes memory for several."""
    dense = any(not entry.is_factored for adapter in adapters for entry in adapter.entries.values())
    return worker_count(options.device) if options.method in _SINGLE and not dense else 1


_Done = tuple[LoRA, TargetMerge, tuple[float, float]]


def _allocated(
    draft: Adapter,
    adapters: Sequence[Adapter],
    weights: tuple[float, ...],
    jobs: list[Job],
    policy: Policy,
    limits: Limits,
    options: Merge,
) -> tuple[list[Job], list[str]]:
    """The jobs with ranks that depend on all spectra, which takes a pass of its own over the targets."""

    def measure(job: Job) -> Spectrum:
        deltas, _ = deltas_of(adapters, job, options)
        op = _merged(deltas, weights, job, options).operator
        norm = None
        if isinstance(policy, Budget) and policy.relative_to == "base":
            if options.base is None:
                raise UsageError("errors relative to the base weights need --base")
            shape = entry_of(job.template).base_shape
            norm = float(options.base.find(draft.format.parameter(job.name), shape).double().norm())
        return _spectrum(job, [spectrum(block) for block in blocks_of(op)], _noise(deltas, weights, job), norm)

    workers = _workers(adapters, options)
    found = dict(zip((j.name for j in jobs), ordered_map(measure, jobs, workers=workers), strict=True))
    if isinstance(policy, Budget):
        largest = {job.name: at_rank(job.template, len(found[job.name].values)) for job in jobs}
        fixed = overhead(draft.with_updates(largest), set(found))
        first = jobs[0].name
        found[first] = replace(found[first], fixed_cost=found[first].fixed_cost + fixed)
    allocation = allocate(found, policy, limits)
    gap = allocation.optimality_gap
    notes = [f"the budget's squared error is within {gap:.3g} of the least possible"] if gap > 1e-9 else []
    return [replace(job, to_rank=allocation.ranks[job.name]) for job in jobs], notes


def _spectrum(job: Job, blocks: Sequence[Tensor], noise: float, base_norm: float | None = None) -> Spectrum:
    """Singular values as ranks of the target count them; what is rounding alone is left out."""
    entry = entry_of(job.template)
    step, cost = entry.rank_step, entry.bytes_per_rank
    pooled = [math.hypot(*column) for column in zip(*(b.tolist() for b in blocks), strict=True)]
    kept = [v for v in pooled if v > noise] or [0.0]
    values = tuple(v / math.sqrt(step) for v in kept for _ in range(step))
    assert entry.base_shape is not None  # of a LoRA it is known
    rows, cols = entry.base_shape[0], math.prod(entry.base_shape[1:])
    return Spectrum(values, cost, rows=rows, cols=cols, fixed_cost=(step - 1) * cost, base_norm=base_norm)


def deltas_of(adapters: Sequence[Adapter], job: Job, options: Merge) -> tuple[list[Operator], list[Update]]:
    """The deltas of one target as float64 operators, with the updates that they are of."""
    updates: list[Update] = []
    deltas: list[Operator] = []
    for i, target in job.sources:
        entry = adapters[i].entries[target]
        update = entry.read()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in update.parameters().values()):
            raise AdapterError(f"{name_of(adapters[i], i)}: {target} holds NaN or infinity; retrain it or leave it out")
        base = base_tensor(adapters[i], target, entry, options.base)
        delta = update.operator(base).to(torch.float64, options.device)
        if deltas and [b.shape for b in blocks_of(delta)] != [b.shape for b in blocks_of(deltas[0])]:
            raise AdapterError(
                f"{job.name}: {deltas[0].shape} in {name_of(adapters[job.sources[0][0]], job.sources[0][0])} and "
                f"{delta.shape} in {name_of(adapters[i], i)}; these adapt different bases"
            )
        updates.append(update)
        deltas.append(delta)
    return deltas, updates


def _merged(deltas: list[Operator], weights: tuple[float, ...], job: Job, options: Merge) -> Merged:
    own = job.own(weights)
    density = _density(options, len(weights))
    if options.method == "sum":
        return weighted_sum(deltas, own)
    assert density is not None
    if options.method == "tsv":
        return tsv(deltas, own, density, count=len(weights))
    if options.method == "ties":
        return ties(deltas, own, density)
    if options.method == "knots":
        return knots(deltas, own, density)
    name = flattened(job.name)
    return dare(deltas, own, density, [seed_of(options.seed, name, i) for i, _ in job.sources])


def _noise(deltas: list[Operator], weights: tuple[float, ...], job: Job) -> float:
    """Below this, singular values of a merge are rounding of its terms."""
    size = math.fsum(abs(weight) * frobenius(d) for weight, d in zip(job.own(weights), deltas, strict=True))
    return size * max(deltas[0].shape) * torch.finfo(torch.float64).eps


def _merge_one(
    draft: Adapter,
    adapters: Sequence[Adapter],
    weights: tuple[float, ...],
    job: Job,
    policy: Policy | None,
    limits: Limits,
    options: Merge,
) -> _Done:
    deltas, updates = deltas_of(adapters, job, options)
    result = _merged(deltas, weights, job, options)
    op, noise = result.operator, _noise(deltas, weights, job)
    if frobenius(op) <= noise:  # what is left of terms that cancel
        op = op * 0.0
    best, rank = _best(op, deltas, job, noise, policy, limits, options.seed)
    scale = draft.format.writable_scale(job.name, rank, 1.0, "fold")
    new = fit_update(job.template, best, target=job.name, scale=scale, base=None)
    assert isinstance(new, LoRA)
    new = replace(new, up_bias=_bias(updates, job, weights, new))
    stored = new.operator().to(torch.float64, options.device)
    norm, error = frobenius(op), frobenius(sum_of([op, -stored]))
    ranks: list[int | None] = [None] * len(adapters)
    cosines: list[float | None] = [None] * len(adapters)
    for (i, target), delta in zip(job.sources, deltas, strict=True):
        ranks[i] = adapters[i].entries[target].rank
        if norms := norm * frobenius(delta):
            cosines[i] = max(-1.0, min(1.0, inner(delta, op) / norms))
    relative = error / norm if norm else 0.0
    nbytes = entry_of(new).nbytes
    row = TargetMerge(tuple(ranks), rank, relative, tuple(cosines), result.sign_conflicts, nbytes)
    return new, row, (error * error, norm * norm)


def _best(
    op: Operator,
    deltas: Sequence[Operator],
    job: Job,
    noise: float,
    policy: Policy | None,
    limits: Limits,
    seed: int,
) -> tuple[Operator, int]:
    """The best approximation at the rank that the policy chooses, and that rank as dialects count it."""
    step = entry_of(job.template).rank_step
    most = min(min(block.shape) for block in blocks_of(op))
    upto = most
    if job.to_rank is not None:
        upto = _steps(job.to_rank, step, policy)
    elif isinstance(policy, Fixed) and limits == Limits():
        upto = _steps(policy.value, step, policy)
    elif policy is None:  # the sum of ranks, which for a sum is no limit
        upto = max(1, sum(_rank(delta) for delta in deltas))
    upto = min(upto, most, *(block.rank for block in blocks_of(op) if isinstance(block, LowRank)))
    found = truncate(op, upto, seed=seed)
    usable = _spectrum(job, [s[:upto] for s in found.spectra], noise)
    kept = len(usable.values) // step
    if (
        isinstance(policy, LocalPolicy)
        and job.to_rank is None
        and not (isinstance(policy, Fixed) and limits == Limits())
    ):
        whole = _spectrum(job, found.spectra, noise)
        kept = min(kept, _steps(limits.fit(policy.rank(whole), len(whole.values)), step, policy))
    return _leading(found, kept), kept * step


def _steps(rank: int, step: int, policy: Policy | None) -> int:
    """Whole steps: never above a rank or budget that was asked for, never below an energy."""
    return max(1, rank // step if isinstance(policy, Fixed | Budget) else -(-rank // step))


def _rank(delta: Operator) -> int:
    return max(b.rank if isinstance(b, LowRank) else min(b.shape) for b in blocks_of(delta))


def _leading(found: Truncation, rank: int) -> Operator:
    """The first components of a truncation, which are sorted."""
    blocks = [
        LowRank(b.left[:, :rank], b.right[:rank], b.scale) for b in blocks_of(found.operator) if isinstance(b, LowRank)
    ]
    return blocks[0] if isinstance(found.operator, LowRank) else replace(found.operator, blocks=tuple(blocks))


def _bias(updates: Sequence[Update], job: Job, weights: tuple[float, ...], new: LoRA) -> Tensor | None:
    """The weighted sum of the changes of the bias, whatever the rule for the weights."""
    if new.up_bias is None:
        return None
    total = torch.zeros(new.up_bias.shape, dtype=torch.float64)
    for weight, update in zip(job.own(weights), updates, strict=True):
        if (change := update.bias_delta()) is not None:
            total += weight * change.double().reshape(total.shape)
    return cast_to(total / new.scale, new.up_bias.dtype)
