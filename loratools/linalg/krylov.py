"""Leading singular triplets from products alone, with proven bounds on what may have been missed.

Block Golub-Kahan bidiagonalisation from a Gaussian block of b columns, fully orthogonalised, with Rayleigh-Ritz. Two
facts turn its Ritz values t_1 >= t_2 >= ... into statements about the singular values s_i of the operator; both are
proven in docs/certificates.md:

* after q blocks, s_i <= t_i / sqrt(1 - e) unless the random start was unlucky (probability below `FAILURE`), where e
  solves T_{q-1}((1 + e) / (1 - e)) = sqrt((1 - e) / e) g, T is a Chebyshev polynomial, and g bounds the Gaussian
  block's components outside the leading i directions relative to those inside;
* a Ritz triplet with residual r, and with a gap to all other singular values, is within sqrt(2) r / gap of a singular
  vector on either side (Davis and Kahan).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.factored import column_signs
from loratools.linalg.svd import thin_svd

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.operators import Operator

FAILURE = 1e-12  # chance, over the seeded random start, that a bound on missed singular values does not hold
BLOCK = 32
_SPARE = 8  # columns of the block beyond an index for which it bounds the singular value well
_DENSE_BELOW = 4 * BLOCK  # smaller sides are decomposed whole
_MAX_BASIS = 1024  # vectors on either side
_ROUNDING = 8  # units of the dtype's precision, relative to the largest singular value, that a residual may lack


@dataclass(frozen=True, eq=False)
class Leading:
    """The first k singular triplets of an operator, or what is near them.

    `errors` bounds the distance of each column of `u`, and of each row of `vt`, from a singular vector of that index
    (up to its sign); it is infinite where nothing is known. `top` is an upper bound on the largest singular value.
    """

    u: Tensor  # (m, k)
    s: Tensor  # (k,) float64, descending
    vt: Tensor  # (k, n)
    errors: Tensor  # (k,) float64
    top: float


def leading_triplets(
    op: Operator, count: int, *, proven: bool = True, tolerance: float = 1e-5, seed: int = 0
) -> Leading:
    """The leading `count` triplets of `op` and a few more, each within `tolerance` of the truth where that can be had.

    Needs products alone, in the dtype and on the device of `op`; stops at `tolerance` for the first `count`, where
    rounding is all that is left, or when the basis is full. Errors are bounds where `proven`; otherwise they trust the
    Ritz values to be all the leading ones there are, as ARPACK's users do. Signs as in `balanced_factors`. A small
    operator is decomposed whole, in float64.
    """
    m, n = op.shape
    block = BLOCK * math.ceil((count + 1 + _SPARE) / BLOCK)
    if min(m, n) <= max(_DENSE_BELOW, 2 * block):
        return _whole(op, min(block - _SPARE, m, n))
    kept = block - _SPARE
    run = _Run(op, block, seed, proven=proven)
    limit = max(2, min(_MAX_BASIS, m, n) // block)
    look = 4
    for step in range(1, limit + 1):
        run.extend()
        if step < min(look, limit):
            continue
        found, settled = run.ritz(kept, limit)
        if bool(settled[:count].all() | (found.errors <= tolerance)[:count].all()):
            break
        look = math.ceil(1.25 * step)
        if proven:
            look = max(look, _enough_steps(found.s.tolist(), count, block, limit, n))
    return found


def _enough_steps(values: list[float], count: int, block: int, limit: int, columns: int) -> int:
    """How many blocks would tell the first `count` singular values from the rest, by what is known of them."""
    for steps in range(2, limit):
        known = range(count, len(values) - 1)
        if any(_ceiling(values[i], i + 1, block, steps, columns) < values[count - 1] for i in known):
            return steps
    return limit


def _whole(op: Operator, kept: int) -> Leading:
    u, s, vt = thin_svd(op)
    values = torch.cat([s, s.new_zeros(1)])[: kept + 1]
    gaps = torch.minimum(-values.diff(), torch.cat([values.new_full((1,), math.inf), -values.diff()])[:kept])
    rounding = _ROUNDING * torch.finfo(s.dtype).eps * s[:1]
    errors = torch.where(gaps > 0, math.sqrt(2) * rounding / gaps.clamp_min(1e-300), math.inf)
    dtype = op.leaf.dtype
    return Leading(u[:, :kept].to(dtype), s[:kept], vt[:kept].to(dtype), errors, float(s[0]) * (1 + 1e-12))


class _Run:
    """The two orthonormal bases as they grow, and the operator between them."""

    def __init__(self, op: Operator, block: int, seed: int, *, proven: bool) -> None:
        self.op, self.block, self._proven = op, block, proven
        self._generator = torch.Generator().manual_seed(seed)
        leaf = op.leaf
        self._u = leaf.new_empty(op.shape[0], 0)
        self._v = leaf.new_empty(op.shape[1], 0)
        self._next_v = torch.linalg.qr(self._noise(op.shape[1]))[0]
        self._core = torch.zeros(0, 0, dtype=torch.float64)  # u^T op v
        self._coupling = torch.zeros(block, block, dtype=torch.float64)  # (next v)^T op^T (last block of u)

    def extend(self) -> None:
        """One more block on either side."""
        v = self._next_v
        image = self.op.matmat(v)
        u = self._orthogonal(image, self._u)
        above, corner = (self._u.T @ image).cpu().double(), (u.T @ image).cpu().double()
        self._u, self._v = torch.cat([self._u, u], dim=1), torch.cat([self._v, v], dim=1)
        size = self._core.shape[0]
        core = torch.zeros(size + self.block, size + self.block, dtype=torch.float64)
        core[:size, :size], core[:size, size:], core[size:, size:] = self._core, above, corner
        self._core = core
        image = self.op.rmatmat(u)
        self._next_v = self._orthogonal(image, self._v)
        self._coupling = (self._next_v.T @ image).cpu().double()

    def ritz(self, kept: int, limit: int) -> tuple[Leading, Tensor]:
        """The best triplets in the bases with what is proven of them, and for which more blocks would add nothing:

        because rounding is all that is left, or because not even `limit` blocks could tell them from the rest.
        """
        p, s, qt = torch.linalg.svd(self._core)
        measured = (self._coupling @ p[-self.block :, : kept + 1]).norm(dim=0)
        rounding = _ROUNDING * torch.finfo(self._u.dtype).eps * s[0]
        residuals = measured + rounding
        steps = len(s) // self.block
        values = s[: kept + 1].tolist()
        ceilings = [self._ceiling(value, i + 1, steps) for i, value in enumerate(values)]
        errors = _vector_errors(values, residuals.tolist(), ceilings)
        u = self._u @ p[:, :kept].to(self._u)
        vt = qt[:kept].to(self._v) @ self._v.T
        signs = column_signs(u)
        bounds = torch.tensor(errors, dtype=torch.float64)
        last = self._ceiling(values[-1], kept + 1, limit)
        settled = (measured[:kept] <= rounding) & torch.isfinite(bounds)
        return Leading(u * signs, s[:kept], vt * signs.T, bounds, ceilings[0]), settled | (s[:kept] < last)

    def _ceiling(self, ritz: float, index: int, steps: int) -> float:
        return _ceiling(ritz, index, self.block, steps, self.op.shape[1]) if self._proven else ritz

    def _orthogonal(self, x: Tensor, basis: Tensor) -> Tensor:
        """An orthonormal basis of the part of `x` outside `basis`; random directions where there is none."""
        x = x - basis @ (basis.T @ x)
        q, r = torch.linalg.qr(x)
        lost = r.diagonal().abs() <= 1e-30
        if bool(lost.any()):
            q = torch.where(lost, self._noise(x.shape[0]), q)
        return torch.linalg.qr(q - basis @ (basis.T @ q))[0]

    def _noise(self, rows: int) -> Tensor:
        return torch.randn(rows, self.block, generator=self._generator, dtype=torch.float64).to(self.op.leaf)


def _vector_errors(values: list[float], residuals: list[float], ceilings: list[float]) -> list[float]:
    """For each Ritz value but the last, sqrt(2) residual / gap, with the best of the gaps that can be proven.

    Where the (l + 1)-th singular value is at most `ceilings[l]`, and that lies below the l-th Ritz value less its
    residuals, the first l Ritz values belong to the first l singular values, one to one.
    """
    errors = [math.inf] * (len(values) - 1)
    for known in range(1, len(values)):
        spread = math.hypot(*residuals[:known])
        if not ceilings[known] < values[known - 1] - spread:
            continue
        for i in range(known):
            gap = values[i] - ceilings[known]
            if i > 0:
                gap = min(gap, values[i - 1] - values[i] - spread)
            if i + 1 < known:
                gap = min(gap, values[i] - values[i + 1] - spread)
            if gap > 0:
                errors[i] = min(errors[i], math.sqrt(2) * residuals[i] / gap)
    return errors


def _ceiling(ritz: float, index: int, block: int, steps: int, columns: int) -> float:
    """What the `index`-th singular value is at most, by its Ritz value after `steps` blocks."""
    shortfall = _shortfall(index, block, steps, columns)
    return ritz / math.sqrt(1 - shortfall) if shortfall < 1 else math.inf


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
