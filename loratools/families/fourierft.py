"""FourierFT: a few coefficients of the delta's Fourier transform (Gao et al. 2024, arXiv 2405.03003; PEFT)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools._lazy import torch
from loratools.errors import UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.random_places import check_spectrum, drawn, scattered
from loratools.families.stated import seed_of
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_CHUNK = 1 << 21  # numbers that are gathered at a time


@dataclass(frozen=True)
class FourierFTOptions:
    """`count`: of coefficients, at most as many as entries."""

    count: int = 1000

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"count is {self.count}; it must be 1 or more")


@final
@dataclass(frozen=True, eq=False)
class FourierFT(Fittable):
    """fourierft_spectrum (count,): delta = real part of the inverse transform of a matrix that is zero elsewhere.

    The setting `seed` says where the coefficients lie, by torch's generator of random numbers.
    """

    family: ClassVar[str] = "fourierft"
    required: ClassVar[frozenset[str]] = frozenset({"fourierft_spectrum"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("fourierft_spectrum",)
    Options: ClassVar[type[FourierFTOptions]] = FourierFTOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "Re ifft2(values at places drawn at random)"
    count: ClassVar[str] = "count"
    paper: ClassVar[str] = "Gao et al. 2024, arXiv 2405.03003; PEFT"

    spectrum: Tensor
    seed: int
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> FourierFT:
        return cls(parameters["fourierft_spectrum"], seed_of(settings), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        return check_spectrum("fourierft_spectrum", specs["fourierft_spectrum"].shape)

    def parameters(self) -> dict[str, Tensor]:
        return {"fourierft_spectrum": self.spectrum}

    def stated_settings(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("FourierFT", base, self.layout)
        dense = torch.fft.ifft2(scattered(self.spectrum, self.seed, (m, n), (m, n))).real
        return Dense(dense * self.scale)

    @classmethod
    def encode(cls, source: Source, options: FourierFTOptions) -> FourierFT:
        """Of the real part, (u, v) and (-u, -v) are one cosine of half its weight: orthogonal but for such pairs.

        Where both were drawn they share its coefficient evenly, the shortest of the least-squares solutions. In
        O((m + n) r log + count r) from factors.
        """
        m, n = source.shape
        places = drawn(m * n, min(options.count, m * n), source.seed)
        mirrored = (-(places // n)) % m * n + (-(places % n)) % n
        cosines, drawn_times = _classes(places, mirrored)
        weight = torch.where(places == mirrored, 1.0, 2.0).double()
        values = _real_parts(source.delta, places // n, places % n) * weight / drawn_times[cosines]
        return cls(cast_to(values, source.stored), source.seed, 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> FourierFTOptions | None:
        m, n = source.shape
        count = min(nbytes // source.stored.itemsize, m * n)
        return FourierFTOptions(count) if count else None

    @classmethod
    def size(cls, source: Source, options: FourierFTOptions) -> int:
        return min(options.count, math.prod(source.shape)) * source.stored.itemsize

    @classmethod
    def expected_energy(cls, source: Source, options: FourierFTOptions) -> float:
        """The share of different cosines among all dimensions: count / (m n), but for pairs that were both drawn."""
        m, n = source.shape
        places = drawn(m * n, min(options.count, m * n), source.seed)
        return len(_classes(places, (-(places // n)) % m * n + (-(places % n)) % n)[1]) / (m * n)


def _classes(places: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
    """Which cosine each place is of, and how many places each cosine has."""
    _, cosines, times = torch.minimum(places, mirrored).unique(return_inverse=True, return_counts=True)
    return cosines, times


def _real_parts(delta: Operator, rows: Tensor, columns: Tensor) -> Tensor:
    """Of the Fourier transform of the delta at these places, float64."""
    if not isinstance(delta, LowRank):
        return torch.fft.fft2(delta.to(torch.float64).dense()).real[rows, columns]
    left = torch.fft.fft(delta.left.double(), dim=0)
    right = torch.fft.fft(delta.right.double(), dim=1).T.contiguous()
    step = max(1, _CHUNK // delta.rank)
    parts = zip(rows.split(step), columns.split(step), strict=True)
    return torch.cat([(left[i] * right[j]).sum(1).real for i, j in parts]) * delta.scale
