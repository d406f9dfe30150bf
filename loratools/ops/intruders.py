"""Intruder dimensions: singular vectors of W0 + delta that are like none of W0 (arXiv 2410.21228)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.adapter import Adapter
from loratools.errors import AdapterError, UnchangedError, UsageError
from loratools.families.base import LowRankUpdate
from loratools.linalg.inner import frobenius
from loratools.linalg.svd import truncate
from loratools.operators import LowRank
from loratools.ops.base_spectra import BaseSpectrum, Search
from loratools.ops.examine import Cosines, Examined, energy_share, examine, is_degenerate, tuned_triplets
from loratools.ops.initial import ON_THE_BASE, refuse_mutated
from loratools.ops.inspect import depth, places
from loratools.ops.matrices import matrices_of_target, unsuitable
from loratools.ops.spectra import fit_update, low_rank_part
from loratools.reports.intruders import Count, IntrudersReport, Side, TargetIntruders

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update

SWEEP = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def intruders(
    adapter: Adapter,
    base: BaseWeights,
    *,
    top_k: int = 10,
    epsilon: float = 0.5,
    target: str | None = None,
    sweep: bool = False,
    search: Search = Search(),
    step: Callable[[], None] | None = None,
) -> IntrudersReport:
    """Which of the `top_k` leading singular vectors of W0 + delta have no |cosine| of `epsilon` with any of W0.

    Left vectors, of the output side, and right ones. With `sweep`, verdicts at all thresholds of SWEEP are decided.
    Embedding tables and stacks of experts are skipped. Raises AdapterError for another base and for factors that are
    relative to a changed one; `step` is called after each target.
    """
    _check(adapter, top_k, epsilon)
    thresholds = (epsilon, *(SWEEP if sweep else ()))
    targets, skipped, degenerate = {}, {}, 0
    for name in adapter.select(target) if target else adapter.entries:
        if (reason := unsuitable(adapter, name)) is not None:
            skipped[name] = reason
        else:
            for matrix in matrices_of_target(adapter, name, base):
                known = BaseSpectrum(matrix.parameter, matrix.weight, search)
                found = examine(known, matrix.change, top_k=top_k, thresholds=thresholds)
                degenerate += is_degenerate(known, top_k)
                targets[matrix.parameter] = _told(found, epsilon)
        if step is not None:
            step()
    return _report(targets, skipped, top_k, thresholds, (*adapter.warnings, *_notes(targets, degenerate)))


def mitigate(
    adapter: Adapter,
    base: BaseWeights,
    strength: float,
    *,
    top_k: int = 10,
    epsilon: float = 0.5,
    keep_rank: bool = False,
    search: Search = Search(),
    step: Callable[[], None] | None = None,
) -> tuple[Adapter, IntrudersReport]:
    """The adapter after which every left intruder of W0 + delta has `strength` times its singular value.

    Exact at the rank plus the number of intruders; with `keep_rank`, the best approximation of the old rank, as PEFT's
    reduce_intruder_dimension makes it. Raises UnchangedError where there is no intruder, and AdapterError for a family
    that has no ranks.
    """
    _check(adapter, top_k, epsilon)
    if not 0 <= strength <= 1:
        raise UsageError(f"a strength of {strength} is not between 0, which removes intruders, and 1, which keeps them")
    targets, skipped, degenerate = {}, {}, 0
    updates: dict[str, Update] = {}
    before = after = 0.0
    for name, entry in adapter.entries.items():
        reason = unsuitable(adapter, name)
        if reason is None and (not issubclass(entry.family, LowRankUpdate) or entry.needs_base):
            raise AdapterError(f"{name}: {entry.family.family} is no plain LoRA; convert it to one first")
        if reason is not None:
            skipped[name] = reason
            continue
        matrices = list(matrices_of_target(adapter, name, base))
        if len(matrices) > 1:
            raise AdapterError(f"{name}: covers several matrices of the base; loratools convert takes them apart")
        matrix = matrices[0]
        known = BaseSpectrum(matrix.parameter, matrix.weight, search)
        found = examine(known, matrix.change, top_k=top_k, thresholds=(epsilon,))
        degenerate += is_degenerate(known, top_k)
        update = adapter[name]
        part = low_rank_part(update)
        if not isinstance(part, LowRank):
            raise AdapterError(
                f"{name}: is a grouped convolution, whose groups have no common singular vectors to shrink"
            )
        norm = frobenius(part.to(torch.float64))
        told = _told(found, epsilon)
        share = 1.0
        if told.left.count:
            chosen = told.left.indices
            triplets = tuned_triplets(known, matrix.change, top_k)
            updates[name] = _without(update, part, triplets, chosen, strength, keep_rank=keep_rank, target=name)
            made = low_rank_part(updates[name]).to(torch.float64)
            share = frobenius(made) / norm
        before, after = before + norm**2, after + (share * norm) ** 2
        targets[matrix.parameter] = replace(told, mitigated_norm=share)
        if step is not None:
            step()
    if not updates:
        raise UnchangedError(f"none of {len(targets)} matrices has an intruder at epsilon {epsilon:g}")
    arguments = {"strength": strength, "top_k": top_k, "epsilon": epsilon, "keep_rank": keep_rank}
    result = adapter.recorded("intruders", arguments).with_updates(updates)
    report = _report(targets, skipped, top_k, (epsilon,), (*adapter.warnings, *_notes(targets, degenerate)))
    return result, replace(report, uniform_shrink=math.sqrt(after / before))


def _check(adapter: Adapter, top_k: int, epsilon: float) -> None:
    if top_k < 1:
        raise UsageError(f"top_k is {top_k}; look at one singular vector at least")
    if not 0 < epsilon <= 1:
        raise UsageError(f"an epsilon of {epsilon} is no cosine between 0 and 1")
    adapter.require_weights()
    refuse_mutated(adapter, ON_THE_BASE)


def _told(found: Examined, epsilon: float) -> TargetIntruders:
    left, right = _side(found.left, epsilon), _side(found.right, epsilon)
    share = energy_share(found.values, left.indices)
    return TargetIntruders(left, right, tuple(found.values.tolist()), share, found.verdict)


def _side(cosines: Cosines, epsilon: float) -> Side:
    indices = tuple(int(i) for i in (cosines.most < epsilon).nonzero().flatten())
    most, least, matched = (tuple(t.tolist()) for t in (cosines.most, cosines.least, cosines.matched))
    return Side(len(indices), indices, most, least, matched)


def _without(
    update: Update,
    part: LowRank,
    triplets: tuple[Tensor, Tensor, Tensor],
    chosen: Sequence[int],
    strength: float,
    *,
    keep_rank: bool,
    target: str,
) -> Update:
    ones = list(chosen)
    up, values, down = (t.cpu() for t in triplets)
    left = torch.cat([part.left.double() * part.scale, up[:, ones] * (strength - 1) * values[ones]], dim=1)
    right = torch.cat([part.right.double(), down[ones]])
    whole = LowRank(left, right)
    rank = part.rank if keep_rank else min(whole.rank, *whole.shape)
    best = truncate(whole, rank).operator
    return fit_update(update, best, target=target, scale=1.0, base=None)


def _notes(targets: dict[str, TargetIntruders], degenerate: int) -> list[str]:
    if not degenerate:
        return []
    note = "base weights have nearly equal leading singular values, whose vectors turn freely: counts there say little"
    return [f"{degenerate} of {len(targets)} {note}"]


def _report(
    targets: dict[str, TargetIntruders],
    skipped: dict[str, str],
    top_k: int,
    thresholds: tuple[float, ...],
    warnings: tuple[str, ...],
) -> IntrudersReport:
    total: dict[str, float | int] = {
        "targets": len(targets),
        "certified": sum(t.verdict == "certified" for t in targets.values()),
        "left": sum(t.left.count for t in targets.values()),
        "right": sum(t.right.count for t in targets.values()),
        "examined": sum(len(t.values) for t in targets.values()),
    }
    where = places([name.removesuffix(".weight") for name in targets])
    placed = {
        name: replace(found, layer=layer, module=module)
        for name, found in targets.items()
        for layer, module in (where[name.removesuffix(".weight")],)
    }
    by_k = {
        f"{k}": {
            "left": sum(i < k for t in targets.values() for i in t.left.indices),
            "right": sum(i < k for t in targets.values() for i in t.right.indices),
        }
        for k in range(1, top_k + 1)
    }
    return IntrudersReport(
        top_k,
        thresholds[0],
        placed,
        total,
        _sweep(targets.values(), thresholds),
        by_k,
        _counts(placed.values(), lambda t: t.layer, depth),
        _counts(placed.values(), lambda t: t.module, None),
        skipped,
        warnings,
    )


def _counts(
    targets: Iterable[TargetIntruders],
    place: Callable[[TargetIntruders], str],
    order: Callable[[str], tuple[str, int]] | None,
) -> dict[str, Count]:
    found: dict[str, list[TargetIntruders]] = {}
    for target in targets:
        found.setdefault(place(target), []).append(target)
    return {
        name: Count(len(of), sum(t.left.count for t in of), sum(t.right.count for t in of))
        for name, of in ((name, found[name]) for name in (sorted(found, key=order) if order else found))
    }


def _sweep(targets: Collection[TargetIntruders], thresholds: Sequence[float]) -> dict[str, dict[str, int]]:
    """The counts at every threshold at which verdicts were decided."""
    sides = {"left": [t.left for t in targets], "right": [t.right for t in targets]}
    return {
        f"{e:g}": {name: sum(c < e for side in of for c in side.max_cosine) for name, of in sides.items()}
        for e in sorted(set(thresholds))
    }
