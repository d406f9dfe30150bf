"""Low-rank and dense deltas on one grid: the step decides ranks and bits at once, and deflating spends the bits.

Written as delta = (U S) S^-1 (S V^T), an error in an entry of either factor counts the same in the delta, whatever its
component. So one step for all entries of all targets is reverse water-filling (Cover and Thomas, 10.3.3): components
above the step get the bits that their size asks for, those below it vanish. What is rounded costs its entropy, to
which deflating comes near. Singular vectors are the gauge for that: each row keeps one spread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from loratools._lazy import torch
from loratools.linalg.factored import balanced_factors, factored
from loratools.linalg.weighted import weighted_factors
from loratools.operators import LowRank
from loratools.quant.grid import LARGEST, Gridded, unit_of_rows
from loratools.storage.packed import Coded, sides

# A number within this much of half a step goes to the smaller magnitude: it errs more, and costs less.
DEADZONE = 0.15
# The share of the inputs' weight that is as they were met; the rest is the same in every direction. A real task lost
# least with about this much; benchmarks/input_shares.py tries others.
MEASURED = 0.8
_FINEST = 2.0**-12  # steps to the largest entry, beyond which there is nothing that 16 bits would not hold


@dataclass(frozen=True, eq=False)
class Components:
    """delta = x diag(1 / s) y with x = U S and y = S V^T (or in a weighted norm, likewise).

    `channels`: what each input channel weighs, a mean of 1, where inputs are known.
    """

    x: torch.Tensor  # (m, r) float64, or float32 once made `single`
    s: torch.Tensor  # (r,) float64
    y: torch.Tensor  # (r, n) as x
    channels: torch.Tensor | None = None  # (n,) float64

    @cached_property
    def largest(self) -> float:
        """The largest entry on either side."""
        return max(float(self.x.abs().max()), float(self.y.abs().max())) if self.s.numel() else 0.0

    @property
    def nbytes(self) -> int:
        """What both sides take in memory."""
        return (self.x.numel() + self.y.numel()) * self.x.element_size()

    def single(self, scale: float) -> Components:
        """In float32, divided by the scale with which the delta is written; each component's entries side by side."""
        by = scale or 1.0
        return replace(self, x=(self.x.T / by).float().contiguous().T, s=self.s / abs(by), y=(self.y / by).float())


def components_of(part: LowRank) -> Components:
    """The components of a low-rank delta, in the order of what they matter; zeros are left out."""
    left, right = part.left.double() * part.scale, part.right.double()
    best = balanced_factors(factored(left[None], right[None]), min(left.shape[0], *right.shape))
    return _components(best.up[0], best.down[0], best.spectrum[0][: best.up.shape[2]])


def weighted_components_of(part: LowRank, moment: torch.Tensor, channels: torch.Tensor) -> Components:
    """The components that matter most to the outputs, for inputs of which `moment` and mean squares are known.

    `moment` is E[(right x)(right x)^T]. Errors count by `MEASURED` of the inputs as they were met, and for the rest by
    inputs of that energy in no direction in particular: what few texts leave almost empty others may not.
    """
    right, mean = part.right.double(), float(channels.mean())
    met = MEASURED / mean if mean > 0 else 0.0
    blended = met * moment.double() + (1 - MEASURED) * (right @ right.T)
    up, down, s = weighted_factors(part.left.double() * part.scale, right, blended)
    return replace(_components(up, down, s), channels=met * channels.double() + (1 - MEASURED))


def _components(up: torch.Tensor, down: torch.Tensor, s: torch.Tensor) -> Components:
    some = s > 1e-12 * s.max().clamp_min(1e-300)
    root = s[some].sqrt()
    return Components(up[:, some] * root, s[some], down[some] * root.unsqueeze(1))


def on_grid(c: Components, step: float, least: int = 1, *, trial: bool = False) -> tuple[Coded, Coded]:
    """up (m, k) and down (k, n) whose product approximates the delta, at the grid `step`; k is at least `least`.

    One gain for each component, solved for all of them together, makes good what rounding towards zero takes away. A
    trial, for the size alone, does without.
    """
    m, n = c.x.shape[0], c.y.shape[1]
    none = torch.zeros(least, m, dtype=torch.int16), torch.zeros(least, n, dtype=torch.int16)
    if not c.s.numel():
        return _pair(*none, torch.zeros(1), torch.zeros(1))
    step = max(step, finest_step(c.largest))
    x, y = rounded(c.x.T / step), rounded(c.y / step)
    kept = (x.abs().amax(1) > 0) & (y.abs().amax(1) > 0)
    if not bool(kept.any()):  # less than the step: a component of zeros
        return _pair(*none, torch.zeros(1), torch.zeros(1))
    x, y, nominal = x[kept], y[kept], step**2 / c.s[kept]
    gains = nominal if trial else _gains(c, x.T.double(), y.double(), nominal)
    if (more := least - len(x)) > 0:  # components of zeros
        pad = torch.nn.functional.pad
        x, y, gains, nominal = (
            pad(x, (0, 0, 0, more)),
            pad(y, (0, 0, 0, more)),
            pad(gains, (0, more)),
            pad(nominal, (0, more)),
        )
    return _pair(x, y, gains, nominal)


def finest_step(largest: float) -> float:
    """The step for numbers up to `largest` below which there is nothing to gain."""
    return largest * max(_FINEST, 1 / (LARGEST - 1))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The whole numbers near x as int16, those just above a half rounded to the smaller magnitude."""
    return (x + torch.copysign(torch.tensor(0.5 - DEADZONE, dtype=x.dtype), x)).to(torch.int16)  # cut off, not rounded


def _gains(c: Components, x: torch.Tensor, y: torch.Tensor, nominal: torch.Tensor) -> torch.Tensor:
    """The gains that bring sum_i gain_i x_i y_i nearest to the delta; the nominal ones where that has no answer."""
    weighed = y if c.channels is None else y * c.channels
    gram = (x.T @ x) * (weighed @ y.T)
    target = ((c.x.T.double() @ x) * ((c.y.double() / c.s.unsqueeze(1)) @ weighed.T)).sum(0)
    jitter = 1e-10 * gram.diagonal().mean()
    gains, failed = torch.linalg.solve_ex(gram + jitter * torch.eye(len(gram), dtype=gram.dtype), target)
    sound = int(failed) == 0 and bool(torch.isfinite(gains).all())
    # a gain far from the nominal one belongs to components that rounding made nearly equal
    return torch.where((gains / nominal - 1).abs() < 1, gains, nominal) if sound else nominal


def _pair(x: torch.Tensor, y: torch.Tensor, gains: torch.Tensor, nominal: torch.Tensor) -> tuple[Coded, Coded]:
    """x (k, m) and y (k, n) with their gains; how those are stored follows from the nominal ones, as in a trial."""
    share = math.sqrt(float(nominal.mean())) or 1.0
    twice = half_if_it_fits((2 * nominal / share).float())  # no gain is larger
    up = Gridded(x, (gains / share).to(twice.dtype))
    down = Gridded(y, torch.tensor([share], dtype=torch.float32))
    return Coded((x.shape[1], x.shape[0]), up, transposed=True), Coded((y.shape[0], y.shape[1]), down)


def multiplied(coded: Coded, by: float) -> Coded:
    """A matrix on a grid, times a number that is not zero; its codes stay."""
    assert isinstance(coded.parts, Gridded)  # of which `on_grid` makes two
    return replace(coded, parts=replace(coded.parts, scales=coded.parts.scales * by))


def dense_on_grid(matrix: torch.Tensor, step: float) -> Coded:
    """A dense delta (m, n) at the grid `step`, with a gain for each row."""
    x = matrix.double()
    largest = float(x.abs().max()) if x.numel() else 0.0
    step = max(step, finest_step(largest)) or 1.0
    codes = rounded(x / step)
    wide = codes.double()
    square = wide.square().sum(1)
    gains = torch.where(square > 0, (wide * x).sum(1) / square.clamp_min(1), 0.0)
    return Coded(tuple(matrix.shape), Gridded(codes, half_if_it_fits(gains.float())))


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
