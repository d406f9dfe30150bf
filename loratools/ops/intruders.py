"""Intruder dimensions: singular vectors of W0 + delta that are like none of W0 (arXiv 2410.21228)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.adapter import Adapter
from loratools.errors import AdapterError, UnchangedError, UsageError
from loratools.families.base import LowRankUpdate
from loratools.linalg.inner import frobenius
from loratools.linalg.svd import truncate
from loratools.operators import LowRank
from loratools.ops.delta import delta_of_target
from loratools.ops.initial import ON_THE_BASE, refuse_mutated
from loratools.ops.spectra import fit_update, low_rank_part
from loratools.reports.intruders import IntrudersReport, Side, TargetIntruders

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update

SWEEP = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_CLOSE = 1e-3  # of a cosine to the threshold: decided in float64
_DEGENERATE = 1e-3  # relative gap of neighbouring singular values, below which their vectors turn freely


@dataclass(frozen=True)
class _Found:
    """One matrix: both sides, and the leading singular triplets of W0 + delta."""

    left: Side
    right: Side
    values: Tensor
    up: Tensor  # (m, k)
    down: Tensor  # (k, n)
    degenerate: bool

    @property
    def energy_share(self) -> float:
        squares = self.values.square()
        return float(squares[list(self.left.indices)].sum() / squares.sum()) if len(squares) else 0.0


def intruders(
    adapter: Adapter,
    base: BaseWeights,
    *,
    top_k: int = 10,
    epsilon: float = 0.5,
    target: str | None = None,
    step: Callable[[], None] | None = None,
) -> IntrudersReport:
    """Which of the `top_k` leading singular vectors of W0 + delta have no |cosine| of `epsilon` with any of W0.

    Left vectors, of the output side, and right ones, from dense SVDs. Embedding tables and stacks of experts are
    skipped. Raises AdapterError for another base and for factors that are relative to a changed one; `step` is called
    after each target.
    """
    _check(adapter, top_k, epsilon)
    targets, skipped, degenerate = {}, {}, 0
    for name in adapter.select(target) if target else adapter.entries:
        if (reason := _skipped(adapter, name)) is not None:
            skipped[name] = reason
        else:
            for parameter, weight, change in _matrices(adapter, name, base):
                found = _measured(weight, change, top_k, epsilon)
                degenerate += found.degenerate
                targets[parameter] = _told(found)
        if step is not None:
            step()
    return _report(targets, skipped, top_k, epsilon, (*adapter.warnings, *_notes(targets, degenerate)))


def mitigate(
    adapter: Adapter,
    base: BaseWeights,
    strength: float,
    *,
    top_k: int = 10,
    epsilon: float = 0.5,
    keep_rank: bool = False,
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
        reason = _skipped(adapter, name)
        if reason is None and (not issubclass(entry.family, LowRankUpdate) or entry.family.needs_base):
            raise AdapterError(f"{name}: {entry.family.family} is no plain LoRA; convert it to one first")
        if reason is not None:
            skipped[name] = reason
            continue
        pairs = list(_matrices(adapter, name, base))
        if len(pairs) > 1:
            raise AdapterError(f"{name}: covers several matrices of the base; loratools convert takes them apart")
        parameter, weight, change = pairs[0]
        found = _measured(weight, change, top_k, epsilon)
        degenerate += found.degenerate
        update = adapter[name]
        part = low_rank_part(update)
        if not isinstance(part, LowRank):
            raise AdapterError(
                f"{name}: is a grouped convolution, whose groups have no common singular vectors to shrink"
            )
        norm = frobenius(part.to(torch.float64))
        share = 1.0
        if found.left.count:
            updates[name] = _without(update, part, found, strength, keep_rank=keep_rank, target=name)
            made = low_rank_part(updates[name]).to(torch.float64)
            share = frobenius(made) / norm
        before, after = before + norm**2, after + (share * norm) ** 2
        targets[parameter] = replace(_told(found), mitigated_norm=share)
        if step is not None:
            step()
    if not updates:
        raise UnchangedError(f"none of {len(targets)} matrices has an intruder at epsilon {epsilon:g}")
    arguments = {"strength": strength, "top_k": top_k, "epsilon": epsilon, "keep_rank": keep_rank}
    result = adapter.recorded("intruders", arguments).with_updates(updates)
    report = _report(targets, skipped, top_k, epsilon, (*adapter.warnings, *_notes(targets, degenerate)))
    return result, replace(report, uniform_shrink=math.sqrt(after / before))


def _check(adapter: Adapter, top_k: int, epsilon: float) -> None:
    if top_k < 1:
        raise UsageError(f"top_k is {top_k}; look at one singular vector at least")
    if not 0 < epsilon <= 1:
        raise UsageError(f"an epsilon of {epsilon} is no cosine between 0 and 1")
    refuse_mutated(adapter, ON_THE_BASE)


def _skipped(adapter: Adapter, name: str) -> str | None:
    layout = adapter.entries[name].layout
    if layout.embedding:
        return "an embedding table"
    return "a stack of experts" if layout.experts > 1 else None


def _matrices(adapter: Adapter, name: str, base: BaseWeights) -> list[tuple[str, Tensor, Tensor]]:
    """(parameter, W0, delta) as (outputs, inputs) matrices."""
    found = []
    for parameter, change in delta_of_target(adapter, name, base):
        if parameter.endswith(".bias"):
            continue
        weight = base.find(parameter, tuple(change.shape))
        sides = [t.reshape(t.shape[0], -1).float() for t in (weight, change.reshape(weight.shape))]
        if sides[0].shape[1] == 1:
            continue  # a norm has no directions
        if adapter.entries[name].layout.transposed:
            sides = [t.T for t in sides]
        found.append((parameter, sides[0], sides[1]))
    return found


def _measured(weight: Tensor, change: Tensor, top_k: int, epsilon: float) -> _Found:
    for dtype in (torch.float32, torch.float64):
        base = weight.to(dtype)
        u0, s0, v0 = torch.linalg.svd(base, full_matrices=False)
        u, s, v = torch.linalg.svd(base + change.to(dtype), full_matrices=False)
        k = min(top_k, len(s))
        sides = (u[:, :k].T @ u0).abs(), (v[:k] @ v0.T).abs()
        if not any(bool(((side.amax(1) - epsilon).abs() < _CLOSE).any()) for side in sides):
            break
    gaps = 1 - s0[1 : k + 1] / s0[:k][: len(s0) - 1].clamp_min(1e-30)
    left, right = (_side(side, epsilon) for side in sides)
    return _Found(left, right, s[:k], u[:, :k], v[:k], bool((gaps < _DEGENERATE).any()))


def _side(cosines: Tensor, epsilon: float) -> Side:
    largest = cosines.amax(1).double().clamp(max=1.0)
    indices = tuple(int(i) for i in (largest < epsilon).nonzero().flatten())
    matched = cosines.diagonal().double().clamp(max=1.0)
    return Side(len(indices), indices, tuple(largest.tolist()), tuple(matched.tolist()))


def _told(found: _Found) -> TargetIntruders:
    values = tuple(found.values.double().tolist())
    return TargetIntruders(found.left, found.right, values, found.energy_share, "dense")


def _without(update: Update, part: LowRank, found: _Found, strength: float, *, keep_rank: bool, target: str) -> Update:
    chosen = list(found.left.indices)
    edit = found.up[:, chosen].double() * (strength - 1) * found.values[chosen].double()
    left = torch.cat([part.left.double() * part.scale, edit], dim=1)
    right = torch.cat([part.right.double(), found.down[chosen].double()])
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
    targets: dict[str, TargetIntruders], skipped: dict[str, str], top_k: int, epsilon: float, warnings: tuple[str, ...]
) -> IntrudersReport:
    total: dict[str, float | int] = {
        "targets": len(targets),
        "left": sum(t.left.count for t in targets.values()),
        "right": sum(t.right.count for t in targets.values()),
        "examined": sum(len(t.values) for t in targets.values()),
    }
    sweep = {
        f"{e:g}": {
            "left": sum(c < e for t in targets.values() for c in t.left.max_cosine),
            "right": sum(c < e for t in targets.values() for c in t.right.max_cosine),
        }
        for e in SWEEP
    }
    return IntrudersReport(top_k, epsilon, targets, total, sweep, skipped, warnings)
