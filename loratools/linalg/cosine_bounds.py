"""How large a cosine can be with any singular vector of an operator, without decomposing it.

Golub-Kahan bidiagonalisation of A started at a unit vector x gives orthonormal vectors x = p_1, p_3, ... on the left
and p_2, p_4, ... on the right, and coefficients b_i with b_{i-1} p_{i-1} + b_i p_{i+1} = A p_i or A^T p_i. For any
singular triplet (s, u, v) the numbers y_i = <p_i, u or v> therefore obey a three-term recurrence,

    b_{i-1} y_{i-1} - s y_i + b_i y_{i+1} = 0,        y_1 = <x, u>,

and their squares sum to at most 1 on either side, so y_1^2 <= 2 / sum of (y_i / y_1)^2: the Christoffel function of the
spectral measure of x. Where s is only known
within h, and products round by n, the recurrence holds within h + n instead; relaxing it with a weight 1 / t^2 keeps
the bound rigorous on a whole interval and gives it in closed form, so that a grid covers all singular values. The proof
is in docs/certificates.md.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.together import products

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from loratools.operators import Operator

_FIRST_LOOK = 8  # steps on either side
_STALLED = 0.25  # of the fall that more steps would bring if a bound fell with their root: no hope below this
_CONFIDENT = 0.95  # of the steps that this foretells, before the next look
_ROUNDING = 16  # units of precision, relative to the largest singular value, that a product may be off
_ORTHOGONAL = 1e-4  # how far from orthonormal the vectors may be
_SHARES = (0.5, 0.9)  # weights of the left norm against the right one, of which any proves a bound
_RESOLUTION = 48  # points of the grid for each vector of the basis, and each eighth of the largest singular value


@dataclass(frozen=True, eq=False)
class Question:
    """Whose cosines: of the unit columns of `starts` with the left singular vectors of `op`; below `enough` will do.

    `op` must not be taller than wide: a part of a start that `op` never reaches would hide behind small singular
    values. `top` bounds the singular values in question. `off` allows for an `op` that maps their vectors onto each
    other only so nearly: an upper bound on ||op v - s u|| and on ||op^T u - s v||.
    """

    op: Operator
    starts: Tensor  # (m, c)
    enough: float
    top: float
    off: float = 0.0


def cosine_bounds(questions: Sequence[Question], *, max_steps: int = 64) -> list[Tensor]:
    """Upper bounds on max_i |<x, u_i>| over all left singular vectors u_i in question, for each start x of each.

    Steps go on until a bound is below what is enough, or no
    longer falls, or `max_steps`; each costs one product with the operator and one with its transpose, and products
    with one matrix are made together. Float64 of shape (c,) for each question. Raises ValueError for a tall operator.
    """
    for question in questions:
        if question.op.shape[0] > question.op.shape[1]:
            raise ValueError(f"{question.op.shape}: is taller than wide; ask for the bounds of its square factor")
    runs = [_Bidiagonal(q, min(max_steps, q.op.shape[0])) for q in questions]
    # Half a step apart, so that the two sides of one matrix ask for the same product at the same time.
    turned = [i % 2 == 1 for i in range(len(runs))]
    for half in itertools.count():
        going = [run for run, late in zip(runs, turned, strict=True) if not run.done and (half or not late)]
        if not going and half:
            return [run.bounds for run in runs]
        for run, image in zip(going, products([run.request() for run in going]), strict=True):
            run.take(image)
    raise AssertionError


class _Bidiagonal:
    """One bidiagonalisation for each start, side by side, with full orthogonalisation."""

    def __init__(self, question: Question, limit: int) -> None:
        self._asked, self._limit = question, limit
        starts, (m, n) = question.starts, question.op.shape
        self._bases = [starts.new_empty(starts.shape[1], limit + 1, size) for size in (n, m)]
        self._bases[1][:, 0] = starts.T
        self._links: list[Tensor] = []  # what couples each vector, in turn left and right, to the next
        self._rest = torch.arange(starts.shape[1])  # the starts still open
        self._last_look, self._next_look = 0, min(_FIRST_LOOK, limit)
        self.bounds = torch.ones(starts.shape[1], dtype=torch.float64)
        self.done = starts.shape[1] == 0 or question.top <= 0

    def request(self) -> tuple[Operator, Tensor]:
        """The product that is needed next."""
        step, from_right = divmod(len(self._links), 2)
        op = self._asked.op
        return (op, self._bases[0][:, step].T) if from_right else (op.T, self._bases[1][:, step].T)

    def take(self, image: Tensor) -> None:
        """Go on with that product."""
        step, side = divmod(len(self._links), 2)
        place = step + side  # the right side has a vector less
        basis, x = self._bases[side][:, :place], image.T
        for _ in range(2 if place else 0):
            x = x - torch.bmm(torch.bmm(x.unsqueeze(1), basis.mT), basis).squeeze(1)
        norm = x.norm(dim=1, keepdim=True)
        self._links.append(norm[:, 0].cpu().double())
        self._bases[side][:, place] = x / norm.clamp_min(torch.finfo(x.dtype).tiny)
        if side == 1:
            self._look(step + 1)

    def _look(self, steps: int) -> None:
        if steps < self._next_look:
            return
        asked, eps = self._asked, torch.finfo(self._bases[0].dtype).eps
        found = _bounds(torch.stack(self._links, dim=1), asked.top, eps, asked.off / asked.top)
        before = self.bounds[self._rest]
        now = torch.minimum(before, found)
        self.bounds[self._rest] = now
        hoped = 1 - math.sqrt(self._last_look / steps)
        going = (now >= asked.enough) & ((1 - now / before > _STALLED * hoped) | (before == 1.0))
        self._last_look = steps
        self.done = steps >= self._limit or not bool(going.any())
        if self.done:
            return
        # bounds fall with the root of the steps, where they fall
        wanted = steps * (float(now[going].amin()) / max(asked.enough, 1e-3)) ** 2
        self._next_look = min(self._limit, max(steps + 2, math.ceil(_CONFIDENT * wanted)))
        if int(going.sum()) * 2 <= len(going):  # fewer columns cost nearly as much: only a halving is worth the copies
            self._rest = self._rest[going]
            self._bases = [basis[going.to(basis.device)] for basis in self._bases]
            self._links = [links[going] for links in self._links]


def _bounds(coefficients: Tensor, top: float, eps: float, off: float) -> Tensor:
    """The bound for each row of coefficients: the greatest over a grid that covers [0, top].

    `eps` is the precision of products, and `off` as in Question, both relative to `top`.
    """
    b = coefficients / top
    links = b.shape[1]
    t = 8 / (_RESOLUTION * (links + 1))
    half = t / 4
    x = half + 2 * half * torch.arange(math.ceil(1 / (2 * half)), dtype=torch.float64)  # centres of the cells
    slack = 1 + _ORTHOGONAL + ((half + off + _ROUNDING * eps * math.sqrt(links)) / t) ** 2
    found = [_first_of_inverse(b.unsqueeze(2), x, t, share) for share in _SHARES]  # (c, cells) each
    best = torch.stack(found).amin(0)
    return (slack * best.amax(dim=1)).clamp(max=1.0).sqrt()


def _first_of_inverse(b: Tensor, x: Tensor, t: float, share: float) -> Tensor:
    """Entry (1, 1) of (D + S^T S / (2 t^2))^-1, S being the recurrence at x, by elimination from the last row upwards.

    D is diagonal, `share` for vectors on the left and 1 - `share` for those on the right.

    S has a row for each vector but the last; S^T S has two diagonals on either side of the main one. b is
    (c, d - 1, 1), x is (g,); the result is (c, g).
    """
    count, links, _ = b.shape
    d, weight = links + 1, 0.5 / t**2
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
        own = (share if j % 2 else 1 - share) + weight * own
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
