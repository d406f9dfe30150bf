"""WaveFT: a few coefficients of the delta's wavelet transform (Bilican et al. 2025, arXiv 2505.12532; PEFT)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.random_places import check_spectrum, drawn, scattered
from loratools.families.stated import seed_of
from loratools.families.waveft_fit import best_coefficients, is_known, padded_size
from loratools.linalg.entries import entries_at
from loratools.linalg.wavelets import filters
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@dataclass(frozen=True)
class WaveFTOptions:
    """`count`: of coefficients, at most as many as entries; `wavelet`: an orthogonal one of PyWavelets, or None for
    entries of the delta itself.
    """

    count: int = 2592
    wavelet: str | None = "db1"

    def __post_init__(self) -> None:
        if self.wavelet is not None:
            filters(self.wavelet)
        if self.count < 1:
            raise UsageError(f"count is {self.count}; it must be 1 or more")


@final
@dataclass(frozen=True, eq=False)
class WaveFT(Fittable):
    """waveft_spectrum (count,): the delta is the middle of one inverse wavelet transform, its four bands side by side.

    Settings: `seed`, which says where the coefficients lie, by torch's generator of random numbers; `wavelet`, by the
    name that PyWavelets gives it, or None where the coefficients are entries of the delta themselves.
    """

    family: ClassVar[str] = "waveft"
    required: ClassVar[frozenset[str]] = frozenset({"waveft_spectrum"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("waveft_spectrum",)
    Options: ClassVar[type[WaveFTOptions]] = WaveFTOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "inverse wavelet transform of values at places drawn at random"
    count: ClassVar[str] = "count"
    paper: ClassVar[str] = "Bilican et al. 2025, arXiv 2505.12532; PEFT"

    spectrum: Tensor
    seed: int
    wavelet: str | None
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> WaveFT:
        seed = seed_of(settings)
        if "wavelet" not in settings:
            raise AdapterError("its settings name no wavelet, nor None for entries")
        wavelet = settings["wavelet"]
        if wavelet is not None and not is_known(wavelet):
            raise AdapterError(f"its settings name the wavelet {wavelet!r}, which PyWavelets does not know")
        return cls(parameters["waveft_spectrum"], seed, wavelet, scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        return check_spectrum("waveft_spectrum", specs["waveft_spectrum"].shape)

    def parameters(self) -> dict[str, Tensor]:
        return {"waveft_spectrum": self.spectrum}

    def stated_settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "wavelet": self.wavelet}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("WaveFT", base, self.layout)
        if self.wavelet is None:
            return Dense(scattered(self.spectrum, self.seed, (m, n), (m, n)) * self.scale)
        import pywt  # takes a tenth of a second

        rows, columns = (padded_size(size, self.wavelet) for size in (m, n))
        bands = scattered(self.spectrum, self.seed, (m, n), (rows, columns)).numpy()
        top, bottom = bands[: rows // 2], bands[rows // 2 :]
        (near, across), (along, fine) = ((band[:, : columns // 2], band[:, columns // 2 :]) for band in (top, bottom))
        dense = torch.from_numpy(pywt.idwt2((near, (across, along, fine)), self.wavelet, mode="zero"))
        return Dense(dense[:m, :n] * self.scale)

    @classmethod
    def encode(cls, source: Source, options: WaveFTOptions) -> WaveFT:
        """In O((m + n) r + count r) from factors; where edges cut wavelets, with small systems along them besides."""
        m, n = source.shape
        places = drawn(m * n, min(options.count, m * n), source.seed)
        if options.wavelet is None:
            values = entries_at(source.delta, places)
        else:
            values = best_coefficients(source.delta, *_coordinates(places, (m, n), options.wavelet), options.wavelet)
        return cls(cast_to(values, source.stored), source.seed, options.wavelet, 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> WaveFTOptions | None:
        m, n = source.shape
        count = min(nbytes // source.stored.itemsize, m * n)
        return WaveFTOptions(count) if count else None

    @classmethod
    def size(cls, source: Source, options: WaveFTOptions) -> int:
        return min(options.count, math.prod(source.shape)) * source.stored.itemsize

    @classmethod
    def expected_energy(cls, source: Source, options: WaveFTOptions) -> float:
        m, n = source.shape
        return min(1.0, options.count / (m * n))


def _coordinates(places: Tensor, shape: tuple[int, int], wavelet: str) -> tuple[Tensor, Tensor]:
    """Which wavelet of the rows and which of the columns the coefficients at these entries are of, details last.

    The quadrant to the right has the details of rows and the one below those of columns, as PyWavelets' horizontal
    and vertical bands have.
    """
    padded = [padded_size(size, wavelet) for size in shape]
    at = [
        place + (size - plain) // 2
        for place, size, plain in zip((places // shape[1], places % shape[1]), padded, shape, strict=True)
    ]
    below, right = (place >= size // 2 for place, size in zip(at, padded, strict=True))
    row, column = (place % (size // 2) for place, size in zip(at, padded, strict=True))
    return row + right * (padded[0] // 2), column + below * (padded[1] // 2)
