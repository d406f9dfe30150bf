"""Both diagonals of a RandLoRA in turn, each by least squares, as PEFT pairs bases and rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.diagonal import projected, solved
from loratools.linalg.inner import frobenius
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor

_TRIED = 3  # sweeps from every start, before the better goes on
_STILL = 1e-3  # of what is captured, and of what is not: a sweep that gains less is the last
_NUMBERS = 2**24  # of the systems that are solved at once


def alternated(delta: Operator, a: Tensor, b: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """(left (r, j), right (j, short)) with sum over p of b_p rows_p near the tall `delta` (long, short).

    a (r, short) and b (long, j, r), float64. Column p of b, ordered by j and then r, meets row p of left * a * right,
    ordered by r and then j. Two starts: a constant right side, and the one that rows without that structure hint at.
    """
    columns = b.flatten(1)  # (long, j r)
    if not isinstance(delta, LowRank):
        delta = Dense(delta.dense())
    fit = _Fit(delta, columns, columns.T @ columns, _seen(delta, columns), a, b.shape[1], frobenius(delta) ** 2)
    tried = [fit.descended(start, _TRIED) for start in (a.new_ones(b.shape[1], a.shape[1]), fit.hint())]
    _, left, right = fit.descended(max(tried, key=lambda end: end[0])[2], sweeps)
    sizes = left.square().mean(0).sqrt(), right.square().mean(1).sqrt()  # of each base: one root mean square for both
    ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), (sizes[1] / sizes[0]).sqrt(), 1.0)
    return left * ratio, right / ratio.unsqueeze(1)


def _seen(delta: LowRank | Dense, columns: Tensor) -> LowRank | Dense:
    """columns^T delta."""
    if isinstance(delta, LowRank):
        return LowRank(columns.T @ delta.left.to(columns), delta.right.to(columns), delta.scale)
    return Dense(columns.T @ delta.matrix.to(columns))


@dataclass(frozen=True, eq=False)
class _Fit:
    """What does not change between sweeps."""

    delta: LowRank | Dense
    columns: Tensor  # (long, j r), by j and then r
    gram: Tensor  # of the columns
    seen: LowRank | Dense  # columns^T delta
    a: Tensor  # (r, short)
    count: int  # j
    total: float  # squared norm of the delta

    def descended(self, right: Tensor, sweeps: int) -> tuple[float, Tensor, Tensor]:
        """(captured squared norm, left, right) from one start."""
        captured, left = 0.0, right.new_zeros(len(self.a), self.count)
        for _ in range(sweeps):
            rows = (self.a.unsqueeze(1) * right).flatten(0, 1)  # (r j, short), by r and then j
            left = solved(self.gram * (rows @ rows.T), projected(self.delta, self.columns, rows)).reshape(left.shape)
            right, now = _right(self.seen, self.gram, left, self.a)
            before, captured = captured, now
            if captured - before <= _STILL * min(captured, self.total - captured):
                break
        return captured, left, right

    def hint(self) -> Tensor:
        """Right sides (j, short): rows that the columns leave free are left * a * right for each base, times noise."""
        inner = self.seen.left if isinstance(self.seen, LowRank) else self.seen.matrix
        free = solved(self.gram, inner.T).T.reshape(len(self.a), self.count, -1)
        found = self.a.new_empty(self.count, self.a.shape[1])
        for j in range(self.count):
            rows = free[:, j] @ self.seen.right if isinstance(self.seen, LowRank) else free[:, j]  # (r, short)
            found[j] = torch.linalg.svd(rows * self.a, full_matrices=False)[2][0] * self.a.shape[1] ** 0.5
        return found


def _right(seen: Operator, gram: Tensor, left: Tensor, a: Tensor) -> tuple[Tensor, float]:
    """The best right side for a left one, and the squared norm that both capture: a small system for each column."""
    (rank, short), count = a.shape, left.shape[1]
    scaled = left.flatten()  # by r and then j, as `gram` is too
    blocks = (gram * scaled * scaled.unsqueeze(1)).reshape(rank, count, rank, count).permute(1, 0, 3, 2)  # j r j r
    right, captured = a.new_zeros(count, short), 0.0
    step = max(1, _NUMBERS // (count * max(count, rank)))
    for start in range(0, short, step):
        part = a[:, start : start + step]  # (r, c)
        sides = (_columns(seen, start, step) * scaled.unsqueeze(1)).reshape(rank, count, -1)
        sides = (sides * part.unsqueeze(1)).sum(0)  # (j, c)
        systems = torch.empty(part.shape[1], count, count, dtype=a.dtype)
        for j in range(count):
            half = (blocks[j].reshape(rank * count, rank) @ part).reshape(rank, count, -1)
            systems[:, j] = (half * part.unsqueeze(1)).sum(0).T
        found = solved(systems, sides.T).T
        right[:, start : start + step] = found
        captured += float((found * sides).sum())
    return right, captured


def _columns(op: Operator, start: int, count: int) -> Tensor:
    if isinstance(op, LowRank):
        return op.left @ op.right[:, start : start + count] * op.scale
    return op.dense()[:, start : start + count]
