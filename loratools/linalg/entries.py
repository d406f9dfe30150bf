"""Single entries of operators, and the largest ones, without the whole matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.operators import Dense, LowRank, Operator, Sparse, Sum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

CHUNK = 1 << 21  # entries that are made at a time
_GATHER = 16  # times as long as in a product of matrices an entry takes by itself
# Least share of the mean square of the inputs that a channel is taken to have: none drops out for lack of data.
FLOOR = 1e-8


def rows_of(op: Operator, start: int, stop: int) -> Tensor:
    """Rows `start` up to `stop` of the matrix, float64."""
    if isinstance(op, Dense):
        return op.matrix[start:stop].double()
    if isinstance(op, LowRank):
        return op.left[start:stop].double() @ op.right.double() * op.scale
    if isinstance(op, Sum):
        return sum((rows_of(t, start, stop) for t in op.terms[1:]), start=rows_of(op.terms[0], start, stop))
    units = torch.zeros(op.shape[0], stop - start, dtype=torch.float64, device=op.leaf.device)
    units[range(start, stop), range(stop - start)] = 1.0
    return op.to(torch.float64).rmatmat(units).T


def row_blocks(op: Operator, *, multiple: int = 1, most: int = CHUNK) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of the whole matrix in turn, float64, about `most` entries at a time.

    The number of rows is a multiple of `multiple`, but for the last block.
    """
    step = max(1, most // max(1, op.shape[1] * multiple)) * multiple
    for start in range(0, op.shape[0], step):
        yield start, rows_of(op, start, min(start + step, op.shape[0]))


def entries_at(op: Operator, places: Tensor) -> Tensor:
    """The entries at flat places (row * n + column), float64, in the order of `places`."""
    n = op.shape[1]
    if isinstance(op, Dense):
        return op.matrix.reshape(-1)[places].double()
    if isinstance(op, LowRank) and len(places) * _GATHER < op.shape[0] * n:
        left, right = op.left.double(), op.right.double().T.contiguous()
        step = max(1, CHUNK // max(1, op.rank))
        parts = [(left[p // n] * right[p % n]).sum(1) for p in places.split(step)]
        return torch.cat(parts) * op.scale
    if isinstance(op, Sparse):
        known, order = op.places.sort()
        at = torch.searchsorted(known, places).clamp(max=len(known) - 1)
        return torch.where(known[at] == places, op.values[order][at].double(), 0.0)
    if isinstance(op, Sum):
        return sum((entries_at(t, places) for t in op.terms[1:]), start=entries_at(op.terms[0], places))
    found = torch.zeros(len(places), dtype=torch.float64, device=op.leaf.device)
    for start, rows in row_blocks(op):
        inside = (places >= start * n) & (places < (start + len(rows)) * n)
        found[inside] = rows.reshape(-1)[places[inside] - start * n]
    return found


def largest(op: Operator, count: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(places, values) of the `count` entries of the largest |value|, times the weight of their column where given.

    Places are flat and ascend, (count,) int64; values float64. Of equals the first count. Rows are made a block at a
    time: it takes memory for the entries kept and one block.
    """
    n = op.shape[1]
    places = torch.empty(0, dtype=torch.int64, device=op.leaf.device)
    values, sizes = (torch.empty(0, dtype=torch.float64, device=op.leaf.device) for _ in range(2))
    for start, rows in row_blocks(op):
        found = rows.abs() if weights is None else rows.abs() * weights
        least = float(sizes.min()) if len(sizes) == count else -1.0
        new = (found > least).reshape(-1).nonzero().flatten()  # an equal one comes too late
        sizes = torch.cat([sizes, found.reshape(-1)[new]])
        values = torch.cat([values, rows.reshape(-1)[new]])
        places = torch.cat([places, new + start * n])
        kept = first_largest(sizes, count)
        places, values, sizes = places[kept], values[kept], sizes[kept]
    return places, values


def first_largest(sizes: Tensor, count: int) -> Tensor:
    """Where the `count` largest lie, ascending; of equal ones the first."""
    if len(sizes) <= count:
        return torch.arange(len(sizes), device=sizes.device)
    cut = sizes.topk(count, sorted=False).values.min()
    above = sizes > cut
    equal = (sizes == cut).nonzero().flatten()[: count - int(above.sum())]
    above[equal] = True
    return above.nonzero().flatten()


def channel_weights(squares: Tensor | None) -> Tensor | None:
    """What an error in each input channel counts, (n,) float64, given the mean squares of the inputs."""
    if squares is None:
        return None
    mean = float(squares.double().mean())
    return squares.double().clamp(min=FLOOR * mean).sqrt() if mean > 0 else None
