"""The scales of a Tucker tensor with fixed core and factors, one mode after another, in the small space of the core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.diagonal import solved
from loratools.linalg.inner import frobenius
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor

_SWEEPS = 200  # at most
_TRIED = 5  # sweeps from every start, before the best goes on
_STILL = 1e-4  # of what is captured, and of what is not: a sweep that gains less is the last


def along_modes(matrix: Tensor, factors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """(c, product of the factors' rows) from (c, product of `sizes`): factors (rows, size) applied along each mode."""
    x = matrix.reshape(len(matrix), *sizes)
    for mode, factor in enumerate(factors, start=1):
        x = torch.movedim(torch.tensordot(factor, x, dims=([1], [mode])), 0, mode)
    return x.reshape(len(matrix), -1)


def fitted_scales(delta: Operator, core: Tensor, factors: Sequence[Tensor], cut: int, seed: int) -> Tensor:
    """(sum of ranks,) for which no small change of one mode brings the tensor nearer to `delta`.

    `core` (ranks) and `factors` (size, rank) float64, those of the rows before `cut`. Starts: ones, what the delta's
    own core hints at, and two of random numbers. All modes end with one root mean square.
    """
    total = frobenius(delta) ** 2
    fit = _Fit(core, _seen(delta, factors, cut).reshape(core.shape), [a.T @ a for a in factors], total)
    draw = torch.Generator().manual_seed(seed)
    random = [[torch.randn(r, generator=draw, dtype=core.dtype) for r in core.shape] for _ in range(2)]
    starts = [[core.new_ones(r) for r in core.shape], fit.hint(), *random]
    tried = [fit.descended(start, _TRIED) for start in starts]
    captured, scales = fit.descended(max(tried, key=lambda end: end[0])[1], _SWEEPS)
    if captured <= 0:
        return core.new_zeros(sum(core.shape))
    lengths = [math.sqrt(float(d.square().mean())) for d in scales]
    usual = math.exp(math.fsum(math.log(length) for length in lengths) / len(lengths))
    return torch.cat([d * (usual / length) for d, length in zip(scales, lengths, strict=True)])


def _seen(delta: Operator, factors: Sequence[Tensor], cut: int) -> Tensor:
    """The delta along all factors, as a matrix (product of row ranks, product of column ranks)."""
    sides = [[a.T for a in factors[:cut]], [a.T for a in factors[cut:]]]
    sizes = [[len(a) for a in factors[:cut]], [len(a) for a in factors[cut:]]]
    if isinstance(delta, LowRank):
        left = along_modes(delta.left.T.to(factors[0]), sides[0], sizes[0])
        right = along_modes(delta.right.to(factors[0]), sides[1], sizes[1])
        return left.T @ right * delta.scale
    across = along_modes(delta.dense().to(factors[0]), sides[1], sizes[1])
    return along_modes(across.T, sides[0], sizes[0]).T


@dataclass(frozen=True, eq=False)
class _Fit:
    """Everything in the space of the core."""

    core: Tensor
    seen: Tensor  # the delta along all factors
    grams: Sequence[Tensor]  # of the factors
    total: float

    def scaled(self, scales: Sequence[Tensor], but: int) -> Tensor:
        """The core times the scales of all modes but one."""
        x = self.core
        for mode, d in enumerate(scales):
            if mode != but:
                x = x * d.reshape(-1, *(1 for _ in range(x.ndim - mode - 1)))
        return x

    def descended(self, scales: Sequence[Tensor], sweeps: int) -> tuple[float, list[Tensor]]:
        """(captured squared norm, scales) from one start."""
        found, captured = list(scales), 0.0
        for _ in range(sweeps):
            before = captured
            for mode in range(self.core.ndim):
                x = self.scaled(found, mode)
                y = x
                for other, gram in enumerate(self.grams):
                    if other != mode:
                        y = torch.movedim(torch.tensordot(gram, y, dims=([1], [other])), 0, other)
                flat = [torch.movedim(t, mode, 0).flatten(1) for t in (x, y, self.seen)]
                sides = (flat[0] * flat[2]).sum(1)
                found[mode] = solved(self.grams[mode] * (flat[0] @ flat[1].T), sides)
                captured = float(found[mode] @ sides)
            if captured - before <= _STILL * min(captured, self.total - captured):
                break
        return captured, found

    def hint(self) -> list[Tensor]:
        """Leading directions of the delta's own core times the fixed one, which are the scales of a member."""
        own = self.seen
        for mode, gram in enumerate(self.grams):
            flat = torch.movedim(own, mode, 0).flatten(1)
            own = torch.movedim(solved(gram, flat.T).T.reshape(torch.movedim(own, mode, 0).shape), 0, mode)
        product = own * self.core
        flats = [torch.movedim(product, mode, 0).flatten(1) for mode in range(product.ndim)]
        return [torch.linalg.eigh(flat @ flat.T).eigenvectors[:, -1] * len(flat) ** 0.5 for flat in flats]
