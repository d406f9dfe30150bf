"""One target in codes: the published ways, on the factors as they are or on their singular vectors.

A coder takes an update and gives the tensors of its slots in codes. `Plain` sees a tensor at a time, of any family; the
others take a plain product of two factors and may choose another pair of the same product, for a decoder never sees
which one it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from loratools._lazy import torch
from loratools.errors import UsageError
from loratools.linalg.factored import balanced_factors, factored
from loratools.quant.codec import Coding, Fit, Part, decoded, rounds_of
from loratools.quant.gauges import Gauge, rotation
from loratools.storage.packed import Coded, sides

if TYPE_CHECKING:
    from torch import Tensor

Direct = Literal["rtn", "sign", "lloyd", "nf", "petl"]
Scales = Literal["tensor", "component", "channel", "group"]
Pair: TypeAlias = tuple[Coded, Coded]  # up (m, k), down (k, n)
Band: TypeAlias = tuple[int | None, tuple[Coding, ...], Fit]  # how many components (None: the rest), their codes

PUBLISHED_GROUP = 128  # LoRAQuant and Delta-CoMe


@dataclass(frozen=True)
class Plain:
    """Rounding of every tensor by itself.

    `scales`: numbers that share one: all of a tensor, those of a rank component, those of a channel, or `group`
    consecutive ones of a component. `rounds`: how often what is left is coded again.
    """

    method: Direct = "rtn"
    bits: int = 4
    scales: Scales = "group"
    group: int = 64
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.method == "sign" and self.bits != 1:
            raise UsageError(f"signs take 1 bit, not {self.bits}; choose another --method for more")
        if self.method == "nf" and self.bits not in (2, 3, 4):
            raise UsageError(f"NormalFloat has 2, 3 or 4 bits, not {self.bits}; choose --method rtn or lloyd")
        if self.method in ("lloyd", "petl") and self.bits > 4:
            raise UsageError(f"{self.method} has codebooks of 1 to 4 bits, not {self.bits}; choose --method rtn")
        if self.bits not in (1, 2, 3, 4, 8):
            raise UsageError(f"codes have 1, 2, 3, 4 or 8 bits, not {self.bits}")
        if self.group < 1 or not 1 <= self.rounds <= 8:
            raise UsageError(f"groups of {self.group} in {self.rounds} rounds: give at least 1, and at most 8 rounds")

    @property
    def coding(self) -> Coding:
        """How each round is written."""
        group = {"tensor": -1, "component": 0, "channel": 0, "group": self.group}[self.scales]
        if self.method == "petl":
            return Coding(self.bits, "median", -1, offset=True, stored="F32")
        if self.method == "rtn":
            return Coding(self.bits, "uniform", group, offset=True)
        return Coding(self.bits, "nf" if self.method == "nf" else "lloyd", group)

    @property
    def fit(self) -> Fit:
        """How its scales are found."""
        fits: dict[Direct, Fit] = {
            "rtn": "range",
            "sign": "mean",
            "lloyd": "squares",
            "nf": "peak",
            "petl": "moments",
        }
        return fits[self.method]

    def tensor(self, tensor: Tensor, *, components_last: bool) -> Coded:
        """One stored tensor in codes; its rank components run along its last axis, or along its first."""
        transposed = components_last != (self.scales == "channel")
        matrix = _matrix(tensor, transposed=transposed)
        return Coded(tuple(tensor.shape), tuple(rounds_of(matrix, (self.coding,) * self.rounds, self.fit)), transposed)


def _matrix(tensor: Tensor, *, transposed: bool) -> Tensor:
    rows, columns = sides(tuple(tensor.shape), transposed=transposed)
    return (tensor.reshape(columns, rows).T if transposed else tensor.reshape(rows, columns)).contiguous()


@dataclass(frozen=True)
class Banded:
    """Singular vectors in bands of components, each with its own codes: the way of LoRAQuant and of Delta-CoMe."""

    bands: tuple[Band, ...]
    gauge: Gauge = "svd"
    sweeps: int = 0  # of least squares, one factor for the other
    seed: int = 0

    def pair(self, left: Tensor, right: Tensor) -> Pair:
        """left (m, r) @ right (r, n), float64, in codes."""
        return self.of_singular(*singular_pair(left, right))

    def of_singular(self, up: Tensor, down: Tensor) -> Pair:
        """As `pair`, of what `singular_pair` makes of the factors."""
        heights = self._heights(up.shape[1])
        spin = rotation(up, down, heights, self.gauge, self.seed)
        up, down = up @ spin, spin.T @ down
        exact = up, down
        coded_up, coded_down = self._coded(up.T, heights), self._coded(down, heights)
        best, least = (coded_up, coded_down), self._error(exact, coded_up, coded_down)
        for _ in range(self.sweeps):
            v = _values(coded_down, down)
            coded_up = self._coded(_solve(v @ v.T, v @ down.T @ up.T), heights)
            u = _values(coded_up, up.T)
            coded_down = self._coded(_solve(u @ u.T, u @ up @ down), heights)
            if (error := self._error(exact, coded_up, coded_down)) < least:
                best, least = (coded_up, coded_down), error
        m, n, k = up.shape[0], down.shape[1], up.shape[1]
        return Coded((m, k), best[0], transposed=True), Coded((k, n), best[1])

    def _heights(self, rank: int) -> list[int]:
        """Components in each band."""
        found, left = [], rank
        for count, _, _ in self.bands:
            found.append(left if count is None else min(count, left))
            left -= found[-1]
        return found

    def _coded(self, rows: Tensor, heights: list[int]) -> tuple[Part, ...]:
        parts: list[Part] = []
        start = 0
        for height, (_, codings, fit) in zip(heights, self.bands, strict=True):
            if height and codings:
                parts += rounds_of(rows[start : start + height], codings, fit, start=start)
            start += height
        return tuple(parts)

    @staticmethod
    def _error(exact: tuple[Tensor, Tensor], up: tuple[Part, ...], down: tuple[Part, ...]) -> float:
        u, v = _values(up, exact[0].T), _values(down, exact[1])
        mine = u.T, v
        return _inner(exact, exact) - 2 * _inner(exact, mine) + _inner(mine, mine)


def _inner(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """The Frobenius inner product of two products of factors."""
    return float(((a[0].T @ b[0]) * (a[1] @ b[1].T)).sum())


def _values(parts: tuple[Part, ...], like: Tensor) -> Tensor:
    return decoded(parts, *like.shape).to(like)


def _solve(gram: Tensor, target: Tensor) -> Tensor:
    jitter = 1e-9 * gram.diagonal().mean()
    if not float(jitter) > 0:
        return torch.zeros_like(target)
    return torch.linalg.solve(gram + jitter * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), target)


def singular_pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """U sqrt(S) and sqrt(S) V^T of left @ right, float64, with deterministic signs."""
    best = balanced_factors(factored(left[None], right[None]), min(left.shape[0], *right.shape))
    return best.up[0], best.down[0]


def loraquant(singular_values: Sequence[float], *, high_bits: int, energy: float) -> Banded:
    """LoRAQuant (arXiv 2510.26690) with its published faults mended.

    The leading components that hold at least `energy` of the squared norm in `high_bits` by round-to-nearest, the rest
    as signs, in groups of 128. Its code takes one component fewer, so that less energy is kept than asked for, and its
    refinement, whose rounding has no gradient, changes scales alone; here there is none.
    """
    squares = [value * value for value in singular_values]
    total, kept, count = sum(squares), 0.0, 0
    while count < len(squares) and kept < energy * total:
        kept += squares[count]
        count += 1
    group = PUBLISHED_GROUP
    return Banded(
        (
            (count, (Coding(high_bits, "uniform", group, offset=True),), "range"),
            (None, (Coding(1, "lloyd", group),), "mean"),
        )
    )


def delta_come(rank: int, *, bits: float) -> Banded:
    """Delta-CoMe's mixed precision (NeurIPS 2024), rounded to nearest where it has GPTQ and calibration data.

    Of the bytes of `bits` to a number at full rank: 8 bits for the first 1/32 of the components that remain, 3 for
    the next half, 2 for the others, in the shares in which its authors give 2, 32 and about 1,000 to a 7B model.
    """
    group = PUBLISHED_GROUP
    kept = max(1, min(rank, round(rank * bits / 2.5)))
    first, second = max(1, kept // 32), kept // 2
    counts = {8: first, 3: second, 2: max(0, kept - first - second)}
    coded: tuple[Band, ...] = tuple(
        (count, (Coding(bits, "uniform", group, offset=True),), "range") for bits, count in counts.items()
    )
    return Banded((*coded, (None, (), "range")))


def balanced(bits: int, *, group: int, gauge: Gauge, sweeps: int, rounds: int = 1, seed: int = 0) -> Banded:
    """All components in `bits` of Lloyd and Max, in the gauge that suits rounding."""
    if bits == 8:
        return Banded(((None, (Coding(8, "uniform", group, offset=True),) * rounds, "range"),), gauge, sweeps, seed)
    return Banded(((None, (Coding(bits, "lloyd", group),) * rounds, "squares"),), gauge, sweeps, seed)
