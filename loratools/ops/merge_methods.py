"""How the updates of one module become one: each rule takes deltas, never factors, so no gauge matters to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from loratools._lazy import torch
from loratools.linalg.svd import blocks_of, thin_svd
from loratools.operators import BlockDiagonal, Dense, LowRank, Operator, sum_of

Rule = Literal["sum", "ties", "dare", "knots", "tsv"]

# Entries, or shares of singular triples, kept where nothing is said: those of the papers.
DENSITY: dict[Rule, float] = {"ties": 0.2, "dare": 0.1, "knots": 0.2}
# Singular values below this share of the largest are rounding: the direction of such a vector means nothing.
_NOISE = 1e-12


@dataclass(frozen=True, eq=False)
class Merged:
    """The exact result of a rule; `sign_conflicts` is the share of entries with kept values of both signs."""

    operator: Operator
    sign_conflicts: float | None = None


def weighted_sum(deltas: Sequence[Operator], weights: Sequence[float]) -> Merged:
    """sum_t w_t delta_t, factored where all terms are."""
    total = sum_of([delta * weight for delta, weight in zip(deltas, weights, strict=True)])
    return Merged(total if _is_factored(total) else _like(deltas[0], [b.dense() for b in blocks_of(total)]))


def ties(deltas: Sequence[Operator], weights: Sequence[float], density: float) -> Merged:
    """TIES-Merging (arXiv 2306.01708): trim each delta to its largest entries, elect signs, average those that agree.

    The share `density` of the entries of each delta is kept, more where magnitudes tie; weights multiply what is kept,
    the sign of an entry is that of its sum, and the mean goes over the deltas that have it. Dense, with memory for a
    few matrices, whatever the number of deltas.
    """
    count, shapes = len(deltas), [block.shape for block in blocks_of(deltas[0])]

    def flat(t: int) -> torch.Tensor:  # made again for each pass, so that one is in memory at a time
        return torch.cat([b.dense().flatten() for b in blocks_of(deltas[t])])

    mean, conflicts = _elected(flat, count, weights, density)
    parts = mean.split([m * n for m, n in shapes])
    return Merged(_like(deltas[0], [p.reshape(s) for p, s in zip(parts, shapes, strict=True)]), conflicts)


def dare(deltas: Sequence[Operator], weights: Sequence[float], density: float, seeds: Sequence[int]) -> Merged:
    """DARE (arXiv 2311.03099): keep each entry with probability `density`, divide by it, and sum.

    The mask of delta t is `torch.rand(entries) < density`, in float32 on the CPU from a generator seeded with seeds[t].
    """
    totals = [torch.zeros(b.shape, dtype=torch.float64, device=b.leaf.device) for b in blocks_of(deltas[0])]
    for delta, weight, seed in zip(deltas, weights, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        for total, block in zip(totals, blocks_of(delta), strict=True):
            mask = (torch.rand(block.shape, generator=generator) < density).to(total.device)
            total += torch.where(mask, block.dense() * (weight / density), 0.0)
    return Merged(_like(deltas[0], totals))


def knots(deltas: Sequence[Operator], weights: Sequence[float], density: float) -> Merged:
    """KnOTS (arXiv 2410.19735): [delta_1 ... delta_T] = U S [V_1 ... V_T]^T, TIES on the V_t, then U S V^T.

    Factored throughout: the SVD is that of a core of the ranks' sum. The density counts entries of V_t.
    """

    def one(parts: Sequence[Operator]) -> tuple[Operator, float]:
        lows = [_factored(part) for part in parts]
        q, r = torch.linalg.qr(torch.cat([low.left * low.scale for low in lows], dim=1))  # (m, k), (k, ranks)
        columns = r.split([low.rank for low in lows], dim=1)
        core = torch.cat([c @ low.right for c, low in zip(columns, lows, strict=True)], dim=1)  # (k, T n)
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
        kept = int((s > _NOISE * s[:1]).sum())
        if kept == 0:
            return LowRank(q[:, :1] * 0.0, lows[0].right.new_zeros(1, lows[0].shape[1])), 0.0
        rows = vt[:kept].reshape(kept, len(lows), -1)  # V_t^T is rows[:, t]
        merged, conflicts = _elected(lambda t: rows[:, t].flatten(), len(lows), weights, density)
        return LowRank(q @ u[:, :kept] * s[:kept], merged.reshape(kept, -1)), conflicts

    done = [one(parts) for parts in zip(*map(blocks_of, deltas), strict=True)]
    return Merged(_joined(deltas[0], [op for op, _ in done]), sum(c for _, c in done) / len(done))


def tsv(deltas: Sequence[Operator], weights: Sequence[float], density: float, *, count: int) -> Merged:
    """TSV-Merge (arXiv 2412.00081): the leading singular triples of each delta, with U and V made orthogonal together.

    Of each of T = `count` deltas the share `density` of its triples stays, and at most min(m, n) / T; the joined U
    and V are replaced by the nearest matrices with orthonormal columns (polar factors; for columns that depend on each
    other, partial isometries), and weights multiply the singular values.
    """

    def one(parts: Sequence[Operator]) -> Operator:
        lefts, values, rights = [], [], []
        for part, weight in zip(parts, weights, strict=True):
            u, s, vt = thin_svd(part)
            rank = int((s > _NOISE * s[:1]).sum())
            kept = min(max(1, int(rank * density + 1e-9)), max(1, min(part.shape) // count), rank)
            lefts.append(u[:, :kept])
            values.append(s[:kept] * weight)
            rights.append(vt[:kept].T)
        if not sum(len(v) for v in values):
            return LowRank(lefts[0].new_zeros(part.shape[0], 1), lefts[0].new_zeros(1, part.shape[1]))
        left, right = _orthogonal(torch.cat(lefts, dim=1)), _orthogonal(torch.cat(rights, dim=1))
        return LowRank(left * torch.cat(values), right.T)

    return Merged(_joined(deltas[0], [one(parts) for parts in zip(*map(blocks_of, deltas), strict=True)]))


def seed_of(seed: int, target: str, index: int) -> int:
    """The seed of one delta: of (seed, target, index) alone, so that neither order nor number of targets matters."""
    digest = hashlib.sha256(f"{seed}\n{target}\n{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _elected(
    values: Callable[[int], torch.Tensor], count: int, weights: Sequence[float], density: float
) -> tuple[torch.Tensor, float]:
    """TIES on flat tensors: the mean of what agrees, and the share of entries with both signs."""
    first = values(0)
    mass, positive, negative = torch.zeros_like(first), first < first, first < first  # of no entry yet
    thresholds = []
    for t in range(count):
        value = first if t == 0 else values(t)
        thresholds.append(_threshold(value.abs(), density))
        trimmed = torch.where(value.abs() >= thresholds[t], value * weights[t], 0.0)
        mass += trimmed
        positive |= trimmed > 0
        negative |= trimmed < 0
    conflicts = float((positive & negative).double().mean())
    del first, positive, negative
    total, agreeing = torch.zeros_like(mass), torch.zeros_like(mass)
    for t in range(count):
        value = values(t)
        trimmed = torch.where(value.abs() >= thresholds[t], value * weights[t], 0.0)
        agrees = torch.where(mass >= 0, trimmed > 0, trimmed < 0)
        total += torch.where(agrees, trimmed, 0.0)
        agreeing += agrees
    return total / agreeing.clamp(min=1), conflicts


def _threshold(magnitudes: torch.Tensor, density: float) -> float:
    kept = max(1, int(density * magnitudes.numel() + 1e-9))
    return float(magnitudes.kthvalue(magnitudes.numel() - kept + 1).values)


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    p, d, qt = torch.linalg.svd(x, full_matrices=False)
    kept = int((d > 1e-8 * d[:1]).sum())  # a singular vector of zero is any vector
    return p[:, :kept] @ qt[:kept]


def _factored(op: Operator) -> LowRank:
    if isinstance(op, LowRank):
        return op
    u, s, vt = thin_svd(op)
    return LowRank(u * s, vt)


def _is_factored(op: Operator) -> bool:
    return all(isinstance(block, LowRank) for block in blocks_of(op))


def _like(op: Operator, matrices: Sequence[torch.Tensor]) -> Operator:
    return _joined(op, [Dense(matrix) for matrix in matrices])


def _joined(op: Operator, blocks: Sequence[Operator]) -> Operator:
    return BlockDiagonal(tuple(blocks)) if isinstance(op, BlockDiagonal) else blocks[0]
