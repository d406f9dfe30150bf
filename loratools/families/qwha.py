"""QWHA: a sparse matrix times a Walsh-Hadamard matrix, with places in few bits (Jeon et al. 2025, arXiv 2509.17428)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.places import entries_nbytes, entries_problem, most_entries, pack_places, places_of
from loratools.families.qwha_fit import allocated, largest_of_rows, refined, row_norms, spectrum_of
from loratools.linalg.entries import largest
from loratools.linalg.hadamard import Hadamard
from loratools.operators import Operator, Sparse, Transformed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

ALLOCATIONS = ("adaptive", "energy")


@dataclass(frozen=True)
class QWHAOptions:
    """As many coefficients as a LoRA of `rank` has numbers, or `count`. `allocation`: `adaptive` gives each output its
    own number by the norm of its row to `power`, `energy` takes the largest of all.
    """

    rank: int = 64
    count: int | None = None
    allocation: str = "adaptive"
    power: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("count", self.count)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be 1 or more")
        if self.allocation not in ALLOCATIONS:
            raise UsageError(f"allocation is {self.allocation!r}; there are {' and '.join(ALLOCATIONS)}")
        if not 0 <= self.power < math.inf:
            raise UsageError(f"power is {self.power}; it must be 0 or more")

    def coefficients(self, m: int, n: int) -> int:
        """How many of an (m, n) matrix."""
        return min(m * n, self.rank * (m + n) if self.count is None else self.count)


@final
@dataclass(frozen=True, eq=False)
class QWHA(Fittable):
    """qwha_values (k,), row by row, at the places in F (m, n) that qwha_places, bytes, tells: delta = F H_n / n.

    H_n is that of `loratools.linalg.hadamard`, its entries -1 and 1; the bytes are those of
    `loratools.families.places`. How large the weight is the shape states.
    """

    family: ClassVar[str] = "qwha"
    required: ClassVar[frozenset[str]] = frozenset({"qwha_values", "qwha_places"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("qwha_values",)
    Options: ClassVar[type[QWHAOptions]] = QWHAOptions
    guarantee: ClassVar[Guarantee] = "local"
    formula: ClassVar[str] = "F H_n / n, F sparse"
    count: ClassVar[str] = "k, and k places of about 2 + log2(m n / k) bits, or m n bits where those are fewer"
    paper: ClassVar[str] = "QWHA, arXiv 2509.17428"
    reconstruction: ClassVar[str] = (
        "values are refined by the mean squares of the inputs, where the authors take their full second moments, and "
        "places are packed, where the authors' files hold two integers each"
    )

    values: Tensor
    places: Tensor
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> QWHA:
        return cls(parameters["qwha_values"], parameters["qwha_places"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        return entries_problem("qwha_values", specs["qwha_values"], specs["qwha_places"], layout)

    def parameters(self) -> dict[str, Tensor]:
        return {"qwha_values": self.values, "qwha_places": self.places}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("QWHA", base, self.layout)
        places = places_of("qwha_places", self.places, len(self.values), m * n, (m, n))
        values = self.values.double() * (self.scale / math.sqrt(n))
        return Transformed(Sparse(places, values, (m, n)), None, Hadamard(n))

    @classmethod
    def encode(cls, source: Source, options: QWHAOptions) -> QWHA:
        """The largest coefficients, and where the inputs' squares are known the values of least error for these.

        From factors, coefficients are made a block of rows at a time: m n r in all, and little memory. With squares,
        k^3 / m^2 besides, for k coefficients in m rows.
        """
        m, n = source.shape
        spectrum, total = spectrum_of(source.delta), options.coefficients(m, n)
        if options.allocation == "energy":
            places, values = largest(spectrum, total)
        else:
            counts = allocated(row_norms(spectrum), total, n, options.power)
            places, values = largest_of_rows(spectrum, counts)
        if source.squares is not None and float(source.squares.sum()) > 0:
            values = refined(source.delta, places, source.squares)
        return cls(cast_to(values, source.stored), pack_places(places, m * n), 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> QWHAOptions | None:
        (m, n), item = source.shape, source.stored.itemsize
        fits = most_entries(nbytes, item, m * n)
        return QWHAOptions(count=fits) if fits else None

    @classmethod
    def size(cls, source: Source, options: QWHAOptions) -> int:
        (m, n), count = source.shape, options.coefficients(*source.shape)
        return entries_nbytes(count, source.stored.itemsize, m * n)
