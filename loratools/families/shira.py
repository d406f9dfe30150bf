"""SHiRA: single entries of the weight, trained in place (Bhardwaj et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.sparse import SparseOptions
from loratools.linalg.entries import channel_weights, largest
from loratools.operators import Operator, scattered

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_PLACE = 8  # bytes of a row and a column, int32 each


@dataclass(frozen=True)
class SHiRAOptions(SparseOptions):
    """As for `sparse`, and `rank`: r (m + n) entries, which is what PEFT's `r` means."""

    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"shira: rank is {self.rank}; it must be 1 or more")

    def entries(self, m: int, n: int) -> int:
        """How many of an (m, n) matrix."""
        return super().entries(m, n) if self.rank is None else min(self.rank * (m + n), m * n)


@final
@dataclass(frozen=True, eq=False)
class SHiRA(Fittable):
    """shira_weight (count,) added at shira_indices (2, count), rows over columns; indices may be stored as floats.

    How large the weight is the file does not tell. PEFT takes a file where the count is r (m + n) for one r.
    """

    family: ClassVar[str] = "shira"
    required: ClassVar[frozenset[str]] = frozenset({"shira_weight", "shira_indices"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("shira_weight",)
    Options: ClassVar[type[SHiRAOptions]] = SHiRAOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "values at places, zero elsewhere"
    count: ClassVar[str] = "k, and 2 k places of 32 bits"
    paper: ClassVar[str] = "Bhardwaj et al. 2024, arXiv 2406.13175"

    values: Tensor
    indices: Tensor
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> SHiRA:
        return cls(parameters["shira_weight"], parameters["shira_indices"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        values, indices = specs["shira_weight"].shape, specs["shira_indices"].shape
        if len(values) == 1 and values[0] and indices == (2, values[0]):
            return None
        return f"shira_weight {values} and shira_indices {indices} do not fit together"

    def parameters(self) -> dict[str, Tensor]:
        return {"shira_weight": self.values, "shira_indices": self.indices}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("SHiRA", base, self.layout)
        rows, columns = self.indices.double()
        for places, size in ((rows, m), (columns, n)):
            if not bool(((places >= 0) & (places < size) & (places == places.floor())).all()):
                raise AdapterError(
                    f"shira_indices holds places outside the base weight of {(m, n)}; is it the right base?"
                )
        return scattered(rows.long() * n + columns.long(), self.values.double() * self.scale, (m, n))

    @classmethod
    def encode(cls, source: Source, options: SHiRAOptions) -> SHiRA:
        m, n = source.shape
        places, values = largest(source.delta, options.entries(m, n), channel_weights(source.squares))
        indices = torch.stack([places // n, places % n]).to(torch.int32)
        return cls(cast_to(values, source.stored), indices, 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> SHiRAOptions | None:
        m, n = source.shape
        fits = nbytes // (source.stored.itemsize + _PLACE)
        rank = min(fits, m * n) // (m + n)
        return SHiRAOptions(rank=rank) if rank else None

    @classmethod
    def size(cls, source: Source, options: SHiRAOptions) -> int:
        return options.entries(*source.shape) * (source.stored.itemsize + _PLACE)
