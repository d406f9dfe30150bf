"""Sparse wavelets: the coefficients of the delta's wavelet transform that matter most, and their places."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.places import entries_nbytes, entries_problem, most_entries, pack_places, places_of
from loratools.families.wavelet import wavelet_of
from loratools.linalg.entries import first_largest, largest
from loratools.linalg.wavelets import Wavelet, coefficients, filters, halved
from loratools.operators import Operator, Sparse, Transformed, sum_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


_DEEPEST = 32  # levels: more halve no side that there is


@dataclass(frozen=True)
class WaveletSparseOptions:
    """`count` coefficients, or the `share` of all that there are; `wavelet` and `levels` as for low rank per band."""

    count: int | None = None
    share: float = 0.02
    wavelet: str = "db1"
    levels: int = 1

    def __post_init__(self) -> None:
        filters(self.wavelet)
        for name, value in (("count", self.count), ("levels", self.levels)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be 1 or more")
        if not 0 < self.share <= 1:
            raise UsageError(f"share is {self.share}; it must be above 0 and at most 1")

    def coefficients(self, m: int, n: int) -> int:
        """How many of an (m, n) matrix."""
        return max(1, round(self.share * m * n)) if self.count is None else min(self.count, m * n)


@final
@dataclass(frozen=True, eq=False)
class WaveletSparse(Fittable):
    """wavelet_values (k,), at the places in the matrix of coefficients that wavelet_places, bytes, tells.

    The settings are `wavelet`, by PyWavelets' name, and `levels`; bands lie as `coeffs_to_array` puts them. The bytes
    are those of `loratools.families.places`. How large the weight is the shape states.
    """

    family: ClassVar[str] = "wavelet_sparse"
    required: ClassVar[frozenset[str]] = frozenset({"wavelet_values", "wavelet_places"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("wavelet_values",)
    Options: ClassVar[type[WaveletSparseOptions]] = WaveletSparseOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "inverse wavelet transform of values at places"
    count: ClassVar[str] = "k, and k places of about 2 + log2(m n / k) bits, or m n bits where those are fewer"
    paper: ClassVar[str] = "the largest coefficients, as Donoho and Johnstone 1994; places of Elias 1974 and Fano 1971"

    values: Tensor
    places: Tensor
    wavelet: str
    levels: int
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> WaveletSparse:
        values, places = parameters["wavelet_values"], parameters["wavelet_places"]
        levels = settings.get("levels", 1)
        if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= _DEEPEST:
            raise AdapterError(f"its settings state {levels!r} levels")
        return cls(values, places, wavelet_of(settings), levels, scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        return entries_problem("wavelet_values", specs["wavelet_values"], specs["wavelet_places"], layout)

    def parameters(self) -> dict[str, Tensor]:
        return {"wavelet_values": self.values, "wavelet_places": self.places}

    def stated_settings(self) -> dict[str, Any]:
        return {"wavelet": self.wavelet, "levels": self.levels}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("a sparse wavelet update", base, self.layout)
        places = places_of("wavelet_places", self.places, len(self.values), m * n, (m, n))
        rows, columns, values = places // n, places % n, self.values.double() * self.scale
        terms: list[Operator] = []
        height, width = m, n  # of the approximation that this level takes apart
        for level in range(1, self.levels + 1):
            further = halved(height)[0], halved(width)[0]
            deeper = (rows < further[0]) & (columns < further[1]) & (level < self.levels)
            here = ~deeper
            inner = Sparse(rows[here] * width + columns[here], values[here], (height, width))
            sides = Wavelet(self.wavelet, m, level), Wavelet(self.wavelet, n, level)
            terms.append(Transformed(inner, *sides))
            rows, columns, values = rows[deeper], columns[deeper], values[deeper]
            height, width = further
        return sum_of(terms)

    @classmethod
    def encode(cls, source: Source, options: WaveletSparseOptions) -> WaveletSparse:
        """From factors, each band's coefficients are made a block at a time: m n r in all, and little memory."""
        m, n = source.shape
        count = options.coefficients(m, n)
        places, values = [], []
        for band, op in coefficients(source.delta, options.wavelet, options.levels):
            inside, found = largest(op, min(count, math.prod(band.shape)))
            width = band.shape[1]
            places.append((band.rows.start + inside // width) * n + band.columns.start + inside % width)
            values.append(found)
        order = torch.cat(places).argsort()
        every, all_values = torch.cat(places)[order], torch.cat(values)[order]
        kept = first_largest(all_values.abs(), count)
        stored = cast_to(all_values[kept], source.stored)
        return cls(stored, pack_places(every[kept], m * n), options.wavelet, options.levels, 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> WaveletSparseOptions | None:
        (m, n), item = source.shape, source.stored.itemsize
        if min(m, n) < 2:
            return None
        fits = most_entries(nbytes, item, m * n)
        return WaveletSparseOptions(count=fits) if fits else None

    @classmethod
    def size(cls, source: Source, options: WaveletSparseOptions) -> int:
        (m, n), count = source.shape, options.coefficients(*source.shape)
        return entries_nbytes(count, source.stored.itemsize, m * n)
