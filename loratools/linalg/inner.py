"""Inner products, norms of differences and cosines of operators, on structure."""

from __future__ import annotations

import math

from loratools._lazy import torch
from loratools.linalg.entries import entries_at
from loratools.operators import BlockDiagonal, Kronecker, LowRank, Operator, Sparse, Sum, Transformed, sum_of

# A sparse term that leaves less than this share of the low-rank one's energy outside its places goes dense.
_OUTSIDE = 1e-6


def inner(a: Operator, b: Operator) -> float:
    """The Frobenius inner product <a, b>, accumulated in float64."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    if isinstance(a, Sum):
        return math.fsum(inner(t, b) for t in a.terms)
    if isinstance(b, Sum):
        return math.fsum(inner(a, t) for t in b.terms)
    if isinstance(a, Sparse):
        return float(a.values.double() @ entries_at(b, a.places))
    if isinstance(b, Sparse):
        return inner(b, a)
    if isinstance(a, BlockDiagonal) and isinstance(b, BlockDiagonal) and _same_blocks(a, b):
        return math.fsum(inner(x, y) for x, y in zip(a.blocks, b.blocks, strict=True))
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        lefts = a.left.double().T @ b.left.double()  # (ra, rb)
        rights = a.right.double() @ b.right.double().T
        return float((lefts * rights).sum()) * a.scale * b.scale
    if isinstance(b, LowRank):
        return float((a.to(torch.float64).matmat(b.right.double().T) * b.left.double()).sum()) * b.scale
    if isinstance(a, LowRank):
        return inner(b, a)
    return float((a.to(torch.float64).dense() * b.to(torch.float64).dense()).sum())


def _same_blocks(a: BlockDiagonal, b: BlockDiagonal) -> bool:
    return [x.shape for x in a.blocks] == [y.shape for y in b.blocks]


def frobenius(op: Operator) -> float:
    """The Frobenius norm; exact to rounding even where terms cancel, for a low-rank difference goes through QR."""
    if isinstance(op, LowRank):
        r_left = torch.linalg.qr(op.left.double(), mode="r")[1]
        r_right = torch.linalg.qr(op.right.double().T, mode="r")[1]
        return float(torch.linalg.matrix_norm(r_left @ r_right.T)) * abs(op.scale)
    if isinstance(op, BlockDiagonal):
        return math.hypot(*(frobenius(b) for b in op.blocks))
    if isinstance(op, Kronecker):
        return frobenius(op.left) * frobenius(op.right) * abs(op.scale)
    if isinstance(op, Sparse):
        return float(op.values.double().norm())
    if isinstance(op, Transformed):
        return frobenius(op.inner)
    if isinstance(op, Sum) and (norm := _of_low_and_sparse(op)) is not None:
        return norm
    if isinstance(op, Sum) and (same := _of_coefficients(op)) is not None:
        return frobenius(same)
    return float(torch.linalg.matrix_norm(op.to(torch.float64).dense()))


def _of_low_and_sparse(op: Sum) -> float | None:
    """The norm of low rank + sparse: what the first has outside the places of the second, and both together there."""
    low = next((t for t in op.terms if isinstance(t, LowRank)), None)
    sparse = next((t for t in op.terms if isinstance(t, Sparse)), None)
    if low is None or sparse is None or len(op.terms) > 2:
        return None
    there = entries_at(low, sparse.places)
    whole = frobenius(low) ** 2
    outside = whole - float(there.square().sum())
    if outside <= _OUTSIDE * whole:
        return None
    return math.hypot(math.sqrt(outside), float((there + sparse.values.double()).norm()))


def _of_coefficients(op: Sum) -> Operator | None:
    """Low rank + coefficients, as the coefficients of both: of the same norm, where the transforms are orthogonal."""
    low = next((t for t in op.terms if isinstance(t, LowRank)), None)
    coded = next((t for t in op.terms if isinstance(t, Transformed)), None)
    if low is None or coded is None or len(op.terms) > 2 or coded.shape != coded.inner.shape:
        return None
    left, right = low.left.double(), low.right.double()
    left = left if coded.rows is None else coded.rows.analyse(left)
    right = right if coded.columns is None else coded.columns.analyse(right.T).T
    return sum_of([LowRank(left, right, low.scale), coded.inner.to(torch.float64)])


def relative_error(reference: Operator, other: Operator) -> float:
    """||reference - other|| / ||reference||; 0 where both vanish, infinity where only the reference does."""
    distance, norm = frobenius(sum_of([reference, -other])), frobenius(reference)
    if norm == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return distance / norm


def cosine(a: Operator, b: Operator) -> float:
    """<a, b> / (||a|| ||b||) in [-1, 1]; NaN where either vanishes."""
    norms = frobenius(a) * frobenius(b)
    return max(-1.0, min(1.0, inner(a, b) / norms)) if norms else math.nan
