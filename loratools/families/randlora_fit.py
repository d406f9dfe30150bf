"""Both diagonals of a RandLoRA in turn, each by least squares, as PEFT pairs bases and rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.diagonal import projected, solved
from loratools.linalg.inner import frobenius
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor

_SWEEPS = 20  # at most
_STILL = 1e-3  # of what is captured, and of what is not: a sweep that gains less is the last
_NUMBERS = 2**24  # of the systems that are solved at once


def alternated(delta: Operator, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(left (r, j), right (j, short)) with sum over p of b_p rows_p near the tall `delta` (long, short).

    a (r, short) and b (long, j, r), float64. Column p of b, ordered by j and then r, meets row p of left * a * right,
    ordered by r and then j. Starts from a constant right side.
    """
    (rank, short), count = a.shape, b.shape[1]
    columns = b.flatten(1)  # (long, j r)
    if not isinstance(delta, LowRank):
        delta = Dense(delta.dense())
    seen: Operator  # columns^T delta
    if isinstance(delta, LowRank):
        seen = LowRank(columns.T @ delta.left.to(columns), delta.right.to(columns), delta.scale)
    else:
        seen = Dense(columns.T @ delta.matrix.to(columns))
    gram = columns.T @ columns
    total = frobenius(delta) ** 2
    left, right = a.new_zeros(rank, count), a.new_ones(count, short)
    captured = 0.0
    for _ in range(_SWEEPS):
        rows = (a.unsqueeze(1) * right).flatten(0, 1)  # (r j, short)
        left = solved(gram * (rows @ rows.T), projected(delta, columns, rows)).reshape(rank, count)
        right, now = _right(seen, gram, left, a)
        before, captured = captured, now
        if captured - before <= _STILL * min(captured, total - captured):
            break
    sizes = left.square().mean(0).sqrt(), right.square().mean(1).sqrt()  # of each base: one root mean square for both
    ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), (sizes[1] / sizes[0]).sqrt(), 1.0)
    return left * ratio, right / ratio.unsqueeze(1)


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
