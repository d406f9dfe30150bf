"""All singular vectors of one matrix, and what a low-rank change does to them, told in their own coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.operators import Diagonal, LowRank

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Basis:
    """The thin SVD of an (m, n) matrix, p = min(m, n): u (m, p), s (p,) descending, vt (p, n)."""

    u: Tensor
    s: Tensor
    vt: Tensor


@dataclass(frozen=True, eq=False)
class Rotated:
    """W + change in the coordinates of a basis of W: the first p coordinates on either side are cosines with it.

    The rest, where a side is longer than p, are along new directions, orthonormal and orthogonal to the basis.
    """

    diagonal: Diagonal  # (p + r', p + r''): W
    low: LowRank  # likewise: the change


def decomposed(matrix: Tensor) -> Basis:
    """The basis of a matrix, in its dtype and on its device: a dense SVD."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return Basis(u, s, vt)


def is_basis_of(basis: Basis, matrix: Tensor) -> bool:
    """Whether u diag(s) vt is `matrix`, and orthonormal, judged by random vectors: a damaged file fails this."""
    m, n = matrix.shape
    p = min(m, n)
    if basis.u.shape != (m, p) or basis.s.shape != (p,) or basis.vt.shape != (p, n):
        return False
    generator = torch.Generator().manual_seed(0)
    probe, inside = (torch.randn(size, 1, generator=generator).to(matrix) for size in (n, p))
    pairs = (
        (matrix @ probe, basis.u @ (basis.s.unsqueeze(1) * (basis.vt @ probe))),
        (inside, basis.u.T @ (basis.u @ inside)),
        (inside, basis.vt @ (basis.vt.T @ inside)),
    )
    return all(bool((wanted - found).norm() <= 1e-4 * wanted.norm()) for wanted, found in pairs)


def rotated(basis: Basis, change: LowRank) -> Rotated:
    """W + change in the coordinates of the basis of W, at the cost of two products with it; W itself is not read."""
    left = _coordinates(basis.u, change.left.to(basis.u) * change.scale)
    right = _coordinates(basis.vt.T, change.right.to(basis.vt).T)
    low = LowRank(left, right.T)
    return Rotated(Diagonal(basis.s, low.shape), low)


def _coordinates(vectors: Tensor, x: Tensor) -> Tensor:
    """Coordinates of the columns of `x` along `vectors` (k, p), and along the new directions that they need."""
    inside = vectors.T @ x
    if vectors.shape[0] == vectors.shape[1]:
        return inside
    outside = x - vectors @ inside
    again = vectors.T @ outside
    r = torch.linalg.qr(outside - vectors @ again, mode="r")[1]
    return torch.cat([inside + again, r])
