"""Orthonormal maps from the coordinates of one model's space to those of another's, and what they carry over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.subspace import overlap
from loratools.operators import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.linalg.basis import Basis

_NOISE = 1e-12  # of the largest singular value of products of activations: below lies what rounding left
_ENOUGH = 256  # rows that tell how well a map foretells others
_LEADING = 32  # singular vectors that are compared, a quarter of all at most: all of a square matrix span everything
_SURE = 0.5  # of the cosines of both singular vectors, from which their sign is taken: chance hardly makes two such


@dataclass(frozen=True, eq=False)
class Isometry:
    """left right^T: takes what lies in the span of `right` (k1, p) to that of `left` (k2, p), lengths and angles kept.

    What lies outside goes to zero. Both have orthonormal columns.
    """

    left: Tensor
    right: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(k2, r) of the columns of (k1, r)."""
        return self.left @ (self.right.T @ x.to(self.right))


def carried(change: LowRank, outputs: Isometry, inputs: Isometry) -> LowRank:
    """P_out change P_in^T at the same rank, on the factors alone."""
    return LowRank(outputs(change.left), inputs(change.right.T).T, change.scale)


def procrustes(x: Tensor, y: Tensor) -> Isometry:
    """The isometry P of the least ||P x_i - y_i|| over the rows of (N, k1) and (N, k2).

    By the SVD of y^T x, of which no more directions are taken than it has; fewer rows than channels never form it.
    """
    x, y = x.double(), y.double()
    if len(x) < min(x.shape[1], y.shape[1]):
        q_x, r_x = torch.linalg.qr(x.T)  # (k1, N), (N, N)
        q_y, r_y = torch.linalg.qr(y.T)
        u, s, vt = torch.linalg.svd(r_y @ r_x.T, full_matrices=False)
        left, right = q_y @ u, q_x @ vt.T
    else:
        u, s, vt = torch.linalg.svd(y.T @ x, full_matrices=False)
        left, right = u, vt.T
    kept = s > _NOISE * float(s[0])  # strict: of zeros nothing is kept
    return Isometry(left[:, kept], right[:, kept])


def held_out_cosine(x: Tensor, y: Tensor) -> float:
    """The cosine between P x_i and y_i, all of them together, of every second row, with P from the rows between.

    Of evenly spread ones where there are many. 1 where one set of rows is the other turned or scaled and those for P
    show every direction; about 0 for strangers.
    """
    fit, rest = (torch.arange(start, len(x), 2) for start in (0, 1))
    fit, rest = (rows[:: -(-len(rows) // _ENOUGH) or 1] for rows in (fit, rest))
    fitted = procrustes(x[fit], y[fit])
    there, wanted = fitted(x[rest].T).T, y[rest].double()
    norms = float(there.norm()) * float(wanted.norm())
    return max(0.0, min(1.0, float((there * wanted).sum()) / norms)) if norms else 0.0


def agreement(one: Basis, other: Basis) -> float | None:
    """How far the leading singular vectors of two matrices of one shape span the same, on the side that does less.

    0 for what chance would share, 1 for the same spaces. None for other shapes, which have no common coordinates.
    """
    if one.u.shape != other.u.shape or one.vt.shape != other.vt.shape:
        return None
    count = max(1, min(_LEADING, len(one.s) // 4))
    shares = []
    for a, b in ((one.u, other.u), (one.vt.T, other.vt.T)):
        chance = count / len(a)
        shares.append((overlap(a[:, :count], b[:, :count]) - chance) / (1 - chance) if chance < 1 else 1.0)
    return max(0.0, min(shares))


def projections(basis: Basis) -> tuple[Isometry, Isometry]:
    """The projections onto the outputs and the inputs that a matrix has."""
    return Isometry(basis.u, basis.u), Isometry(basis.vt.T, basis.vt.T)


def between_bases(one: Basis, other: Basis) -> tuple[Isometry, Isometry]:
    """Output and input maps that take each singular vector of one matrix to that of the same place of another.

    As many as both have. A pair of singular vectors has a common sign that no SVD tells: where both matrices have one
    shape and the vectors are alike, it is that of their cosines, and otherwise that of a third moment, which a
    permutation of channels does not change.
    """
    p = min(len(one.s), len(other.s))
    (u, v), (x, y) = ((b.u[:, :p].double(), b.vt[:p].T.double()) for b in (one, other))
    signs = _skew(u, v) * _skew(x, y)
    if u.shape == x.shape and v.shape == y.shape:
        left, right = (u * x).sum(0), (v * y).sum(0)
        sure = (left * right > 0) & (torch.minimum(left.abs(), right.abs()) > _SURE)
        signs = torch.where(sure, _sign(left), signs)
    return Isometry(x * signs, u), Isometry(y * signs, v)


def _skew(u: Tensor, v: Tensor) -> Tensor:
    """The sign of the sum of cubes of each pair of columns, of the side on which it is larger."""
    left, right = ((side**3).sum(0) * len(side) ** 0.5 for side in (u, v))
    return _sign(torch.where(left.abs() >= right.abs(), left, right))


def _sign(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0).to(values)
