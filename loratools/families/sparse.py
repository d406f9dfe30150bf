"""Sparse: the entries of the delta that matter most, their places in about 2 + log2(1 / density) bits each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.places import entries_nbytes, entries_problem, most_entries, pack_places, places_of
from loratools.linalg.entries import channel_weights, largest
from loratools.operators import Operator, Sparse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@dataclass(frozen=True)
class SparseOptions:
    """`count` entries, or the `share` of all that there are."""

    count: int | None = None
    share: float = 0.02

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise UsageError(f"count is {self.count}; it must be 1 or more")
        if not 0 < self.share <= 1:
            raise UsageError(f"share is {self.share}; it must be above 0 and at most 1")

    def entries(self, m: int, n: int) -> int:
        """How many of an (m, n) matrix."""
        return min(m * n, max(1, round(self.share * m * n)) if self.count is None else self.count)


@final
@dataclass(frozen=True, eq=False)
class SparseEntries(Fittable):
    """sparse_values (k,), row by row, at the places in the matrix of all entries that sparse_places, bytes, tells.

    The bytes are those of `loratools.families.places`. How large the weight is the shape states.
    """

    family: ClassVar[str] = "sparse"
    required: ClassVar[frozenset[str]] = frozenset({"sparse_values", "sparse_places"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("sparse_values",)
    Options: ClassVar[type[SparseOptions]] = SparseOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "values at places, zero elsewhere"
    count: ClassVar[str] = "k, and k places of about 2 + log2(m n / k) bits, or m n bits where those are fewer"
    paper: ClassVar[str] = "as SHiRA, Bhardwaj et al. 2024, arXiv 2406.13175; places of Elias 1974 and Fano 1971"

    values: Tensor
    places: Tensor
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> SparseEntries:
        return cls(parameters["sparse_values"], parameters["sparse_places"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        return entries_problem("sparse_values", specs["sparse_values"], specs["sparse_places"], layout)

    def parameters(self) -> dict[str, Tensor]:
        return {"sparse_values": self.values, "sparse_places": self.places}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("a sparse update", base, self.layout)
        places = places_of("sparse_places", self.places, len(self.values), m * n, (m, n))
        return Sparse(places, self.values.double() * self.scale, (m, n))

    @classmethod
    def encode(cls, source: Source, options: SparseOptions) -> SparseEntries:
        m, n = source.shape
        places, values = largest(source.delta, options.entries(m, n), channel_weights(source.squares))
        return cls(cast_to(values, source.stored), pack_places(places, m * n), 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> SparseOptions | None:
        (m, n), item = source.shape, source.stored.itemsize
        fits = most_entries(nbytes, item, m * n)
        return SparseOptions(count=fits) if fits else None

    @classmethod
    def size(cls, source: Source, options: SparseOptions) -> int:
        (m, n), count = source.shape, options.entries(*source.shape)
        return entries_nbytes(count, source.stored.itemsize, m * n)
