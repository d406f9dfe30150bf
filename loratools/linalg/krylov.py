"""Leading singular triplets from products alone, with proven bounds on what may have been missed.

Block Golub-Kahan bidiagonalisation from a Gaussian block of b columns, fully orthogonalised, with Rayleigh-Ritz. Three
facts turn its Ritz values t_1 >= t_2 >= ... into statements about the singular values s_i of the operator; they are
proven in docs/certificates.md:

* after q blocks, s_i <= t_i / sqrt(1 - e) unless the random start was unlucky (probability below `FAILURE`), where e
  solves T_{q-1}((1 + e) / (1 - e)) = sqrt((1 - e) / e) g, T is a Chebyshev polynomial, and g bounds the Gaussian
  block's components outside the leading i directions relative to those inside;
* around a Ritz value that has converged there is one singular value and no other (`isolation`);
* a Ritz triplet with residual r, and with a gap to all other singular values, is within sqrt(2) r / gap of a singular
  vector on either side (Davis and Kahan).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.factored import column_signs
from loratools.linalg.isolation import Ritz, is_isolated, window
from loratools.linalg.svd import thin_svd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from loratools.operators import Operator

FAILURE = 1e-12  # chance, over the seeded random start, that a bound on missed singular values does not hold
BLOCK = 32
_SPARE = 8  # columns of the block beyond an index for which it bounds the singular value well
_DENSE_BELOW = 4 * BLOCK  # smaller sides are decomposed whole
_FIRST_LOOK, _BETWEEN = 4, 2  # blocks before the first look at a basis, and between two at least
_FIRST_QUICK, _BETWEEN_QUICK = 6, 3  # where nothing is to be proven, a look costs more than a product
_ROUGH, _HARDLY = 0.1, 4.0  # errors that are worth proving, if what is proven already is not nearly as good
_GROWTH = 1.2  # of the basis between two looks at it
_FEW_BLOCKS = 8  # where no more fit in, the operator is decomposed whole
_MAX_BASIS = 1024  # vectors on either side
_EXHAUSTED = 32  # units of precision, relative to a block, below which its part outside a basis is rounding
_PASSES, _KEPT = 4, 0.5  # orthogonalisations at most, and the share of a column that the last one has to leave
_ROUNDING = 16  # units of the dtype's precision, relative to the largest singular value, that a residual may lack


@dataclass(frozen=True, eq=False)
class Leading:
    """The first k singular triplets of an operator, or what is near them.

    `errors` bounds the distance of each column of `u`, and of each row of `vt`, from a singular vector of that index
    (up to its sign); it is infinite where nothing is known. `upper[i]` bounds the singular value of index i,
    counted from 0, and those after it, for i up to k.
    """

    u: Tensor  # (m, k)
    s: Tensor  # (k,) float64, descending
    vt: Tensor  # (k, n)
    errors: Tensor  # (k,) float64
    upper: tuple[float, ...]


def leading_triplets(
    op: Operator, count: int, *, start: Tensor | None = None, tolerance: float = 1e-5, seed: int = 0
) -> Leading:
    """The leading `count` triplets of `op` and a few more, each within `tolerance` of the truth where that can be had.

    As a `Krylov` run for all of them: errors are proven bounds, or with `start` those that trust the Ritz values.
    """
    return Krylov(op, count, start=start, seed=seed).leading(range(count), tolerance, proven=start is None)


def leading_of(u: Tensor, s: Tensor, vt: Tensor, count: int) -> Leading:
    """The first `count` triplets of a thin SVD, with errors as rounding in the dtype of its vectors makes them."""
    kept = min(count, len(s))
    values = s.double().cpu()
    unit, rounding = _ROUNDING * torch.finfo(u.dtype).eps, rounding_of(s.to(u.dtype))
    steps = -torch.nn.functional.pad(values, (0, 1)).diff()  # to the next one, from the last to zero
    gaps = torch.minimum(steps, torch.nn.functional.pad(steps, (1, 0), value=math.inf)[:-1])
    errors = math.sqrt(2) * rounding / gaps.clamp_min(1e-300)
    errors = torch.where(errors < 1, errors + unit, math.inf)
    upper = tuple((torch.nn.functional.pad(values, (0, 1))[: kept + 1] + rounding).tolist())
    return Leading(u[:, :kept], values[:kept], vt[:kept], errors[:kept], upper)


def rounding_of(s: Tensor) -> float:
    """What an operator with these leading singular values may be off by, in their dtype."""
    return _ROUNDING * torch.finfo(s.dtype).eps * float(s[0])


class Krylov:
    """The leading triplets of an operator by products alone, in its dtype and on its device, better with every block.

    For at most `count` of them. Begins with a seeded Gaussian block, or with `start` (n, b): right vectors near the
    wanted ones, with which fewer products will do, but nothing is proven. A small operator is decomposed whole, in
    float64. Signs as in `balanced_factors`.
    """

    def __init__(self, op: Operator, count: int, *, start: Tensor | None = None, seed: int = 0) -> None:
        m, n = op.shape
        block = BLOCK * math.ceil((count + 1 + _SPARE) / BLOCK)
        width = block if start is None else start.shape[1]
        self._op, self._block, self._is_random = op, width, start is None
        self._kept = min(block - _SPARE, 2 * width - 1)
        self._small: Leading | None = None
        if min(m, n) <= max(_DENSE_BELOW, _FEW_BLOCKS * width):
            u, s, vt = thin_svd(op)
            self._small = leading_of(u.to(op.leaf), s, vt.to(op.leaf), self._kept)
            return
        self._generator = torch.Generator().manual_seed(seed)
        self._limit = min(max(_MAX_BASIS // width, 2 * _FEW_BLOCKS), min(m, n) // width)
        self._bases = op.leaf.new_empty(m, self._limit * width), op.leaf.new_empty(n, self._limit * width)
        self._steps = 0  # blocks of the bases that are filled
        self._right, triangle = torch.linalg.qr(self._noise(n) if start is None else start)  # what comes next
        self._start_norm = float(torch.linalg.matrix_norm(triangle.double(), 2))
        self._core = torch.zeros(0, 0, dtype=torch.float64)  # u^T op v
        self._coupling = torch.zeros(width, width, dtype=torch.float64)  # right^T op^T (last block of u)
        self._seen: dict[int, tuple[Leading, Tensor, Ritz]] = {}  # by steps

    def leading(self, wanted: Sequence[int], tolerance: float, *, proven: bool) -> Leading:
        """All triplets as they are when the `wanted` ones are within `tolerance`, or cannot be made better.

        That is where rounding is all that is left, or where the basis is full. Errors are proven bounds, or else they
        trust the Ritz values to be all the leading ones there are, as users of ARPACK do.
        """
        if self._small is not None:
            return self._small
        if proven and not self._is_random:
            raise ValueError("nothing is proven of a run that began with chosen vectors")
        ones = list(wanted)
        first, between = (_FIRST_LOOK, _BETWEEN) if proven else (_FIRST_QUICK, _BETWEEN_QUICK)
        while self._steps < min(self._limit, first):
            self._extend()
        while True:
            if self._steps not in self._seen:
                self._seen = {self._steps: self._ritz()}
            found, settled, ritz = self._seen[self._steps]
            if proven:
                found, settled = self._proven(found, settled, ritz)
            if self._steps == self._limit or bool(((found.errors <= tolerance) | settled)[ones].all()):
                return found
            more = max(between, math.ceil((_GROWTH - 1) * self._steps))
            for _ in range(min(more, self._limit - self._steps)):
                self._extend()

    def _extend(self) -> None:
        """One more block on either side."""
        size = self._steps * self._block
        image = self._op.matmat(self._right.contiguous())  # products with columns side by side are slow
        left, above = self._orthogonal(image, self._u)
        core = torch.zeros(size + self._block, size + self._block, dtype=torch.float64)
        core[:size, :size], core[:size, size:], core[size:, size:] = self._core, above.cpu(), (left.T @ image).cpu()
        self._core = core
        for basis, block in zip(self._bases, (left, self._right), strict=True):
            basis[:, size : size + self._block] = block
        self._steps += 1
        image = self._op.rmatmat(left.contiguous())
        self._right, _ = self._orthogonal(image, self._v)
        self._coupling = (self._right.T @ image).cpu().double()

    @property
    def _u(self) -> Tensor:
        return self._bases[0][:, : self._steps * self._block]

    @property
    def _v(self) -> Tensor:
        return self._bases[1][:, : self._steps * self._block]

    def _ritz(self) -> tuple[Leading, Tensor, Ritz]:
        """The best triplets in the bases, trusting their values, and for which of them rounding is all that is left."""
        kept, b = self._kept, self._block
        exact = torch.float64 if self._is_random else self._op.leaf.dtype  # what is proven needs all digits
        p, s, qt = (t.double() for t in torch.linalg.svd(self._core.to(exact)))
        coupled = self._coupling @ p[-b:]  # (b, k): residuals
        measured = coupled[:, : kept + 1].norm(dim=0)
        rounding = rounding_of(s.to(self._op.leaf.dtype))
        values = s[: kept + 1].tolist()
        errors, upper = _vector_errors(values, (measured + rounding).tolist(), values)
        u = self._u @ p[:, :kept].to(self._u)
        vt = qt[:kept].to(self._v) @ self._v.T
        signs = column_signs(u)
        bounds = torch.tensor(errors, dtype=torch.float64) + _ROUNDING * torch.finfo(u.dtype).eps
        found = Leading(u * signs, s[:kept], vt * signs.T, bounds, tuple(upper))
        settled = (measured[:kept] <= rounding) & torch.isfinite(bounds)
        return found, settled, Ritz(s, qt[:, :b].T, coupled.T, self._start_norm)

    def _proven(self, rough: Leading, settled: Tensor, ritz: Ritz) -> tuple[Leading, Tensor]:
        """`rough` with errors that are proven, and which of them will not become better."""
        rounding, columns = rounding_of(ritz.values.to(self._op.leaf.dtype)), self._op.shape[1]
        residuals = (ritz.coupling.norm(dim=1) + rounding).tolist()
        values = ritz.values[: self._kept + 1].tolist()
        ceilings = [self._ceiling(value, i + 1, self._steps) for i, value in enumerate(values)]
        errors, upper = _vector_errors(values, residuals[: self._kept + 1], ceilings)
        for j in range(self._kept):
            if (
                rough.errors[j] < _ROUGH
                and errors[j] > _HARDLY * rough.errors[j]
                and is_isolated(ritz, j, columns=columns, rounding=rounding, failure=FAILURE)
            ):
                errors[j] = min(errors[j], math.sqrt(2) * residuals[j] / window(ritz, j))
        bounds = torch.tensor(errors, dtype=torch.float64) + _ROUNDING * torch.finfo(rough.u.dtype).eps
        return replace(rough, errors=bounds, upper=tuple(upper)), settled & torch.isfinite(bounds)

    def _ceiling(self, ritz: float, index: int, steps: int) -> float:
        """What the `index`-th singular value is at most, by its Ritz value after `steps` blocks."""
        shortfall = _shortfall(index, self._block, steps, self._op.shape[1])
        return ritz / math.sqrt(1 - shortfall) if shortfall < 1 else math.inf

    def _orthogonal(self, x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """An orthonormal basis of the part of `x` outside `basis`, and the coordinates of `x` inside.

        Directions are random where rounding is all that is outside: the space is exhausted, in them or altogether.
        """
        inside = basis.T @ x
        q = x - basis @ inside
        floor = _EXHAUSTED * torch.finfo(x.dtype).eps * float(x.norm())
        for _ in range(_PASSES):
            q, r = torch.linalg.qr(q)
            lost = r.diagonal().abs() <= floor
            if bool(lost.any()):
                q = torch.where(lost, self._noise(x.shape[0]), q)
            elif not basis.shape[1]:
                return q, inside
            again = q - basis @ (basis.T @ q)
            triangle, failed = torch.linalg.cholesky_ex(again.T @ again, upper=True)
            kept = triangle.diagonal()
            if int(failed) == 0 and bool(kept.min() > _KEPT) and bool(kept.max() < 2):  # cheaper than another QR
                return torch.linalg.solve_triangular(triangle, again, upper=True, left=False), inside
            q, floor = again, _EXHAUSTED * torch.finfo(x.dtype).eps
        return torch.linalg.qr(q)[0], inside

    def _noise(self, rows: int) -> Tensor:
        return torch.randn(rows, self._block, generator=self._generator, dtype=torch.float64).to(self._op.leaf)


def _vector_errors(
    values: list[float], residuals: list[float], ceilings: list[float]
) -> tuple[list[float], list[float]]:
    """For each Ritz value but the last, sqrt(2) residual / gap, and an upper bound on the singular value of that index.

    Ritz values never exceed the singular values of their index, and `ceilings` bound those from above. Where just
    `known` of them can exceed a ceiling, which lies below as many Ritz values less their residuals, the singular values
    are within those residuals of the Ritz values, index by index.
    """
    count = len(values) - 1
    upper = [*ceilings]
    for known in range(1, count + 1):
        spread = math.hypot(*residuals[:known])
        if ceilings[known] + spread < values[known - 1]:
            upper[:known] = [min(u, value + spread) for u, value in zip(upper, values[:known], strict=False)]
    errors = []
    for i in range(count):
        gap = min(values[i] - upper[i + 1], values[i - 1] - values[i] if i else math.inf)
        error = math.sqrt(2) * residuals[i] / gap if gap > 0 else math.inf
        errors.append(error if error < 1 else math.inf)  # unit vectors: from there on it says nothing
    return errors, upper


@cache
def _shortfall(index: int, block: int, steps: int, columns: int) -> float:
    """e: the squared Ritz value is at least 1 - e times the squared singular value; 1 where nothing is known."""
    spare = block - index
    if spare < 4 or steps < 2:
        return 1.0
    half = FAILURE / 2
    # Halko, Martinsson and Tropp 2011, proposition 10.4, and Davidson and Szarek 2001
    inside = math.e * math.sqrt(block) / (spare + 1) * half ** (-1 / (spare + 1))
    outside = math.sqrt(columns) + math.sqrt(block) + math.sqrt(-2 * math.log(half))
    log_needed = math.log(inside * outside)
    low, high = 1e-12, 1 - 1e-12
    for _ in range(60):
        e = math.sqrt(low * high)
        reached = _log_cosh((steps - 1) * math.acosh((1 + e) / (1 - e)))
        low, high = (low, e) if reached >= log_needed + 0.5 * math.log((1 - e) / e) else (e, high)
    return high


def _log_cosh(x: float) -> float:
    return x - math.log(2) + math.log1p(math.exp(-2 * x))
