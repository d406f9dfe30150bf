"""How large a cosine can be with any singular vector of an operator, without decomposing it.

Golub-Kahan bidiagonalisation of A started at a unit vector x gives orthonormal vectors x = p_1, p_3, ... on the left
and p_2, p_4, ... on the right, and coefficients b_i with b_{i-1} p_{i-1} + b_i p_{i+1} = A p_i or A^T p_i. For any
singular triplet (s, u, v) the numbers y_i = <p_i, u or v> therefore obey a three-term recurrence,

    b_{i-1} y_{i-1} - s y_i + b_i y_{i+1} = 0,        y_1 = <x, u>,        sum of y_i^2 <= 2,

so y_1^2 <= 2 / sum of (y_i / y_1)^2: the Christoffel function of the spectral measure of x. Where s is only known
within h, and products round by n, the recurrence holds within h + n instead; relaxing it with a weight 1 / t^2 keeps
the bound rigorous on a whole interval and gives it in closed form, so that a grid covers all singular values. The proof
is in docs/certificates.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.operators import Operator

_FIRST_LOOK = 6  # steps on either side
_LOOK_EVERY = 3
_STALLED = 0.98  # of the bound three looks ago: no hope
_ROUNDING = 8  # units of precision, relative to the largest singular value, that a product may be off
_ORTHOGONAL = 1e-4  # how far from orthonormal the vectors may be
_RESOLUTION = 12  # points of the grid for each vector of the basis, and each eighth of the largest singular value
_PAD = 16  # products with this many columns are faster than with some fewer


def cosine_bounds(op: Operator, starts: Tensor, *, top: float, enough: float, max_steps: int = 64) -> Tensor:
    """Upper bounds on max_i |<x, u_i>| over all left singular vectors u_i of `op`, for each unit column x of `starts`.

    `top` bounds the largest singular value. Steps go on until a bound is below `enough`, or no longer falls, or
    `max_steps`; each costs one product with `op` and one with its transpose for all columns that are not done. Float64
    of shape (c,). `op` must not be taller than wide: a part of x that `op` never reaches would hide behind small
    singular values.
    """
    if op.shape[0] > op.shape[1]:
        raise ValueError(f"{op.shape}: is taller than wide; ask for the bounds of its square factor")
    bounds = starts.new_ones(starts.shape[1], dtype=torch.float64).cpu()
    if starts.shape[1] == 0 or top <= 0:
        return bounds
    rest = torch.arange(starts.shape[1])
    run = _Bidiagonal(op, starts)
    history: list[Tensor] = []
    limit = min(max_steps, op.shape[0])
    for step in range(1, limit + 1):
        run.extend()
        if step != limit and (step < _FIRST_LOOK or (step - _FIRST_LOOK) % _LOOK_EVERY):
            continue
        found = _bounds(run.coefficients(), top, torch.finfo(starts.dtype).eps)
        bounds[rest] = torch.minimum(bounds[rest], found)
        history.append(bounds.clone())
        going = bounds[rest] >= enough
        if len(history) > 3:
            going &= bounds[rest] < _STALLED * history[-4][rest]
        if not bool(going.any()):
            break
        if not bool(going.all()):
            rest = rest[going]
            run.keep(going)
    return bounds


class _Bidiagonal:
    """One bidiagonalisation for each start, side by side, with full orthogonalisation."""

    def __init__(self, op: Operator, starts: Tensor) -> None:
        self._op = op
        self._left = starts.T.unsqueeze(1).contiguous()  # (c, steps, m)
        self._right = starts.new_empty(starts.shape[1], 0, op.shape[1])
        self._norms: list[Tensor] = []

    def extend(self) -> None:
        """One more vector on the right, then one on the left."""
        self._right = self._grown(self._right, self._product(self._op.T, self._left[:, -1]))
        self._left = self._grown(self._left, self._product(self._op, self._right[:, -1]))

    def keep(self, chosen: Tensor) -> None:
        """Go on with some of the starts."""
        self._left, self._right = self._left[chosen], self._right[chosen]
        self._norms = [b[chosen] for b in self._norms]

    def coefficients(self) -> Tensor:
        """(c, d - 1) float64: what couples each vector, of the d in turn left and right, to the next."""
        return torch.stack(self._norms, dim=1)

    def _product(self, op: Operator, rows: Tensor) -> Tensor:
        count = rows.shape[0]
        padded = torch.nn.functional.pad(rows.T, (0, -count % _PAD))
        return op.matmat(padded)[:, :count].T

    def _grown(self, basis: Tensor, x: Tensor) -> Tensor:
        """`basis` with the part of x outside it, normalised; its norm is the coefficient."""
        if basis.shape[1]:
            for _ in range(2):
                x = x - torch.bmm(torch.bmm(x.unsqueeze(1), basis.mT), basis).squeeze(1)
        norm = x.norm(dim=1, keepdim=True)
        self._norms.append(norm[:, 0].cpu().double())
        return torch.cat([basis, (x / norm.clamp_min(torch.finfo(x.dtype).tiny)).unsqueeze(1)], dim=1)


def _bounds(coefficients: Tensor, top: float, eps: float) -> Tensor:
    """The bound for each row of coefficients: the greatest over a grid that covers [0, top]."""
    b = coefficients / top
    links = b.shape[1]
    t = 1 / (_RESOLUTION * (links + 1) / 8)
    half = t / 4
    x = half + 2 * half * torch.arange(math.ceil(1 / (2 * half)), dtype=torch.float64)  # centres of the cells
    inverse = _first_of_inverse(b.unsqueeze(2), x, t)  # (c, cells)
    slack = 2 * (1 + _ORTHOGONAL) * (1 + ((half + _ROUNDING * eps * math.sqrt(links)) / t) ** 2)
    return (slack * inverse.amax(dim=1)).clamp(max=1.0).sqrt()


def _first_of_inverse(b: Tensor, x: Tensor, t: float) -> Tensor:
    """Entry (1, 1) of (I + S^T S / t^2)^-1, S being the recurrence at x, by elimination from the last row upwards.

    S has a row for each vector but the last; S^T S has two diagonals on either side of the main one. b is
    (c, d - 1, 1), x is (g,); the result is (c, g).
    """
    count, links, _ = b.shape
    d, weight = links + 1, 1 / t**2
    square = x.square()
    pivot = pivot_after = coupling_after = torch.zeros(count, len(x), dtype=torch.float64)
    for j in range(d, 0, -1):  # the j-th vector stands in the rows j - 1, j and j + 1 of those that there are
        own = torch.zeros(count, len(x), dtype=torch.float64)
        if j >= 2:
            own += b[:, j - 2].square()
        if j < d:
            own += square
        if j + 1 < d:
            own += b[:, j - 1].square()
        own = 1 + weight * own
        if j == d:
            pivot_after, pivot, coupling_after = pivot, own, torch.zeros_like(own)
            continue
        next_one = -weight * x * b[:, j - 1] * (2 if j + 1 < d else 1)
        next_two = weight * b[:, j - 1] * b[:, j] if j + 1 < d else torch.zeros_like(own)
        w = next_two / pivot_after if j + 1 < d else torch.zeros_like(own)
        u = (next_one - w * coupling_after * pivot_after) / pivot
        own = own - u.square() * pivot - w.square() * pivot_after
        pivot_after, pivot, coupling_after = pivot, own, u
    return 1 / pivot
