"""The best diagonal between two fixed matrices: delta ~ left diag(d) right, from products with the factors alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-10  # of the diagonal: decides among equals; its own error is taken out again by a second solve


def best_diagonal(delta: Operator, left: Tensor, right: Tensor) -> Tensor:
    """The d (k,) that minimises ||delta - left diag(d) right||, for left (m, k) and right (k, n), float64.

    The normal equations are (left^T left * right right^T) d = diag(left^T delta right^T), with entrywise products, so
    that neither side of them needs a matrix of m n entries: the cost is k^2 (m + n + k).
    """
    return solved((left.T @ left) * (right @ right.T), projected(delta, left, right))


def projected(delta: Operator, left: Tensor, right: Tensor) -> Tensor:
    """diag(left^T delta right^T) as a vector (k,)."""
    if isinstance(delta, LowRank):
        ours, theirs = left.T @ delta.left.to(left), right @ delta.right.to(left).T  # (k, r) each
        return (ours * theirs).sum(1) * delta.scale
    return (left * delta.matmat(right.T)).sum(0)


def solved(gram: Tensor, sides: Tensor) -> Tensor:
    """x (..., k) with gram x = sides, for positive semi-definite gram (..., k, k): nearly the shortest of many such x.

    One gram may have several sides, as rows. A ridge keeps directions at rest that the equations do not see, and the
    diagonal is made one before: columns of very different lengths, as random bases times trained scales have, count
    alike. Float64.
    """
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    unit = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    ridge = torch.where(lengths > 0, RIDGE, 1.0)
    factor, info = torch.linalg.cholesky_ex(unit + torch.diag_embed(ridge))
    several = gram.ndim == 2 and sides.ndim == 2
    wanted = (sides * inverse).T if several else (sides * inverse).unsqueeze(-1)
    if bool((info == 0).all()):
        found = torch.cholesky_solve(wanted, factor)
        found = found + torch.cholesky_solve(wanted - unit @ found, factor)
    else:
        found = torch.linalg.pinv(unit, hermitian=True, rtol=RIDGE) @ wanted
    return (found.T if several else found.squeeze(-1)) * inverse
