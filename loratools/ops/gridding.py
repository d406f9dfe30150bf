"""Low-rank and dense deltas on one grid: the step decides ranks and bits at once, and deflating spends the bits.

Written as delta = (U S) S^-1 (S V^T), an error in an entry of either factor counts the same in the delta, whatever its
component. So one step for all entries of all targets is reverse water-filling (Cover and Thomas, 10.3.3): components
above the step get the bits that their size asks for, those below it vanish. What is rounded costs its entropy, to
which deflating comes near. Singular vectors are the gauge for that: each row keeps one spread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loratools._lazy import torch
from loratools.linalg.factored import balanced_factors, factored
from loratools.linalg.weighted import weighted_factors
from loratools.operators import LowRank
from loratools.quant.grid import LARGEST, Gridded, unit_of_rows
from loratools.storage.packed import Coded, sides

# A number within this much of half a step goes to the smaller magnitude: it errs more, and costs less.
DEADZONE = 0.15
_FINEST = 2.0**-12  # steps to the largest entry, beyond which there is nothing that 16 bits would not hold


@dataclass(frozen=True, eq=False)
class Components:
    """delta = x diag(1 / s) y with x = U S and y = S V^T (or in a weighted norm, likewise), float64.

    `down_step`: how much coarser the grid of `y` may be, for its errors to count as those of `x` do; `channels`: what
    each input channel weighs, where inputs are known.
    """

    x: torch.Tensor  # (m, r)
    s: torch.Tensor  # (r,)
    y: torch.Tensor  # (r, n)
    down_step: float = 1.0
    channels: torch.Tensor | None = None  # (n,)

    @property
    def largest(self) -> float:
        """The largest entry on either side, in steps of 1."""
        if not self.s.numel():
            return 0.0
        return max(float(self.x.abs().max()), float(self.y.abs().max()) / self.down_step)


def components_of(part: LowRank) -> Components:
    """The components of a low-rank delta, in the order of what they matter; zeros are left out."""
    left, right = part.left.double() * part.scale, part.right.double()
    best = balanced_factors(factored(left[None], right[None]), min(left.shape[0], *right.shape))
    return _components(best.up[0], best.down[0], best.spectrum[0][: best.up.shape[2]])


def weighted_components_of(part: LowRank, moment: torch.Tensor, channels: torch.Tensor) -> Components:
    """The components that matter most to the outputs, for inputs of which `moment` and mean squares are known.

    `moment` is E[(right x)(right x)^T]; an error in an entry of `y` counts by what its channel carries on average.
    """
    up, down, s = weighted_factors(part.left.double() * part.scale, part.right.double(), moment)
    mean = float(channels.mean())
    return replace(_components(up, down, s), down_step=mean**-0.5 if mean > 0 else 1.0, channels=channels.double())


def _components(up: torch.Tensor, down: torch.Tensor, s: torch.Tensor) -> Components:
    some = s > 1e-12 * s.max().clamp_min(1e-300)
    root = s[some].sqrt()
    return Components(up[:, some] * root, s[some], down[some] * root.unsqueeze(1))


def on_grid(c: Components, step: float) -> tuple[Coded, Coded]:
    """up (m, k) and down (k, n) whose product approximates the delta, at the grid `step`; k is at least 1.

    One gain for each component, solved for all of them together, makes good what rounding towards zero takes away.
    """
    m, n = c.x.shape[0], c.y.shape[1]
    if not c.s.numel():
        return _pair(torch.zeros(m, 1), torch.zeros(1, n), torch.zeros(1), 1.0)
    step = max(step, c.largest * _FINEST, c.largest / (LARGEST - 1))
    x, y = rounded(c.x / step), rounded(c.y / (step * c.down_step))
    kept = (x != 0).any(0) & (y != 0).any(1)
    if not bool(kept.any()):  # less than the step: a component of zeros
        return _pair(x[:, :1] * 0, y[:1] * 0, torch.zeros(1), 1.0)
    x, y, s = x[:, kept], y[kept], c.s[kept]
    gains = _gains(c, x, y, step**2 * c.down_step / s)
    return _pair(x, y, gains, math.sqrt(float(gains.abs().mean())) or 1.0)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The whole numbers near x, those just above a half rounded to the smaller magnitude."""
    return torch.sign(x) * torch.floor(x.abs() + (0.5 - DEADZONE))


def _gains(c: Components, x: torch.Tensor, y: torch.Tensor, nominal: torch.Tensor) -> torch.Tensor:
    """The gains that bring sum_i gain_i x_i y_i nearest to the delta; the nominal ones where that has no answer."""
    weighed = y if c.channels is None else y * c.channels
    gram = (x.T @ x) * (weighed @ y.T)
    target = ((c.x.T @ x) * ((c.y / c.s.unsqueeze(1)) @ weighed.T)).sum(0)
    jitter = 1e-10 * gram.diagonal().mean()
    gains, failed = torch.linalg.solve_ex(gram + jitter * torch.eye(len(gram), dtype=gram.dtype), target)
    sound = int(failed) == 0 and bool(torch.isfinite(gains).all())
    # a gain far from the nominal one belongs to components that rounding made nearly equal
    return torch.where((gains / nominal - 1).abs() < 1, gains, nominal) if sound else nominal


def _pair(x: torch.Tensor, y: torch.Tensor, gains: torch.Tensor, share: float) -> tuple[Coded, Coded]:
    up = Gridded(x.T.to(torch.int16).contiguous(), half_if_it_fits((gains / share).float()))
    down = Gridded(y.to(torch.int16).contiguous(), torch.tensor([share], dtype=torch.float32))
    return Coded((x.shape[0], x.shape[1]), up, transposed=True), Coded((y.shape[0], y.shape[1]), down)


def dense_on_grid(matrix: torch.Tensor, step: float) -> Coded:
    """A dense delta (m, n) at the grid `step`, with a gain for each row."""
    x = matrix.double()
    largest = float(x.abs().max()) if x.numel() else 0.0
    step = max(step, largest * _FINEST, largest / (LARGEST - 1)) or 1.0
    codes = rounded(x / step)
    square = codes.square().sum(1)
    gains = torch.where(square > 0, (codes * x).sum(1) / square.clamp_min(1), 0.0)
    return Coded(tuple(matrix.shape), Gridded(codes.to(torch.int16), half_if_it_fits(gains.float())))


def already_on_grid(tensor: torch.Tensor, *, components_last: bool) -> Coded:
    """A factor whose components are whole multiples of a unit each, as it is; ValueError for any other."""
    rows, columns = sides(tuple(tensor.shape), transposed=components_last)
    flat = tensor.double()
    matrix = flat.reshape(columns, rows).T if components_last else flat.reshape(rows, columns)
    units = unit_of_rows(matrix)
    codes = (matrix / torch.where(units > 0, units, 1.0).unsqueeze(1)).round().to(torch.int16).contiguous()
    if bool((units == units[:1]).all()):
        scales = units[:1].float()
    else:
        halves = half_if_it_fits(units.float())
        near = (halves.double() - units).abs() <= 2.0**-20 * units
        scales = halves if bool(near.all()) else units.float()
    return Coded(tuple(tensor.shape), Gridded(codes, scales), transposed=components_last)


def half_if_it_fits(scales: torch.Tensor) -> torch.Tensor:
    """In float16 where that keeps eleven bits of every number, else in float32."""
    size = scales.abs()
    fits = bool(((size == 0) | ((size < 65504) & (size > torch.finfo(torch.float16).tiny))).all())
    return scales.half() if fits else scales.float()
