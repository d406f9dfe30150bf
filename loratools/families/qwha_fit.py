"""QWHA's encoder: how many coefficients each row gets, which ones, and their values by what enters the layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.entries import row_blocks
from loratools.linalg.hadamard import core, core_of, walsh_hadamard
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 1e-4  # of the mean of the squares, added to each, as in the authors' code
_CHUNK = 1 << 22  # numbers of the systems that are solved at a time


def spectrum_of(delta: Operator, weights: Tensor | None = None) -> Operator:
    """delta diag(weights) H^T, with low rank where the delta has it; float64."""
    if isinstance(delta, LowRank):
        right = delta.right.double() if weights is None else delta.right.double() * weights
        return LowRank(delta.left.double(), walsh_hadamard(right), delta.scale)
    dense = delta.to(torch.float64).dense()
    return Dense(walsh_hadamard(dense if weights is None else dense * weights))


def row_norms(op: Operator) -> Tensor:
    """(m,) float64."""
    if isinstance(op, LowRank):
        gram = op.right.double() @ op.right.double().T
        left = op.left.double()
        return ((left @ gram) * left).sum(1).clamp(min=0).sqrt() * abs(op.scale)
    return op.to(torch.float64).dense().norm(dim=1)


def allocated(norms: Tensor, total: int, most: int, power: float) -> Tensor:
    """AdaAlloc: (m,) int64 that sum to `total` and are at most `most`, in proportion to norms^power.

    What rounding down leaves is spread evenly over the rows that are not full; the last few go to the rows that have
    the fewest, one to each.
    """
    shares = norms.double() ** power
    whole = float(shares.sum())
    shares = shares / whole if whole else torch.full_like(shares, 1 / len(shares))
    counts = (shares * total).floor().to(torch.int64).clamp(max=most)
    while (left := total - int(counts.sum())) > 0:
        is_open = counts < most
        each = left // int(is_open.sum())
        if not each:
            fewest = torch.where(is_open, counts, most + 1).argsort(stable=True)[:left]
            counts[fewest] += 1
            break
        counts = torch.where(is_open, (counts + each).clamp(max=most), counts)
    return counts


def largest_of_rows(op: Operator, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(places, values) of the counts[i] largest entries of each row i, places flat and ascending; float64 values."""
    n = op.shape[1]
    places, values = [], []
    for start, rows in row_blocks(op):
        some = counts[start : start + len(rows)]
        top = rows.abs().topk(max(1, int(some.max())), dim=1).indices
        wanted = torch.arange(top.shape[1]) < some.unsqueeze(1)
        row, _ = wanted.nonzero(as_tuple=True)
        column = top[wanted]
        order = (row * n + column).argsort()
        row, column = row[order], column[order]
        places.append((row + start) * n + column)
        values.append(rows[row, column])
    return torch.cat(places), torch.cat(values)


def refined(delta: Operator, places: Tensor, squares: Tensor) -> Tensor:
    """The values at ascending flat places for which sum_j squares_j ||column j of the error||^2 is least; float64.

    Row by row (H_S D H_S^T) v = n H_S D e. Entry (j, l) of H D H^T depends, of the positions within a core's row, on
    their exclusive or alone, so that one table of K n numbers holds all of these matrices.
    """
    n = delta.shape[1]
    weights = squares.double() + DAMPING * float(squares.double().mean())
    table = _gram_table(weights)
    counts = torch.bincount(places // n, minlength=delta.shape[0])
    products = _gathered(spectrum_of(delta, weights), places) * n
    starts = counts.cumsum(0) - counts
    found = torch.empty_like(products)
    order = counts.argsort(stable=True)  # rows of like counts together
    order = order[counts[order] > 0]
    while len(order):
        widest = int(counts[order[-1]])
        step = max(1, _CHUNK // widest**2)
        rows, order = order[-step:], order[:-step]
        inside = torch.arange(widest) < counts[rows].unsqueeze(1)  # (b, k)
        at = (starts[rows].unsqueeze(1) + torch.arange(widest)).clamp(max=len(places) - 1)
        columns = places[at] % n
        gram = _looked_up(table, columns)
        both = inside.unsqueeze(2) & inside.unsqueeze(1)
        gram = torch.where(both, gram, torch.eye(widest, dtype=torch.float64))
        right = torch.where(inside, products[at], 0.0).unsqueeze(2)
        solved = torch.cholesky_solve(right, torch.linalg.cholesky(gram)).squeeze(2)
        found[at[inside]] = solved[inside]
    return found


def _gathered(op: Operator, places: Tensor) -> Tensor:
    """The entries of a matrix at ascending flat places, a block of rows at a time."""
    n = op.shape[1]
    parts = []
    for start, rows in row_blocks(op):
        ends = torch.searchsorted(places, torch.tensor([start * n, (start + len(rows)) * n]))
        parts.append(rows.reshape(-1)[places[int(ends[0]) : int(ends[1])] - start * n])
    return torch.cat(parts)


def _gram_table(weights: Tensor) -> Tensor:
    """(K, K, n / K): at (a, b, x) the entry of H diag(weights) H^T of positions (a, s) and (b, s xor x)."""
    n = len(weights)
    k = core_of(n)
    h = core(k)
    inner = walsh_hadamard(weights.reshape(k, n // k)) if k < n else weights.reshape(k, 1)
    return torch.einsum("ac,bc,cx->abx", h, h, inner)


def _looked_up(table: Tensor, columns: Tensor) -> Tensor:
    """(b, k, k) matrices for columns (b, k)."""
    size = table.shape[2]
    block, inside = columns // size, columns % size
    return table[block.unsqueeze(2), block.unsqueeze(1), inside.unsqueeze(2) ^ inside.unsqueeze(1)]
