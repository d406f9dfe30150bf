"""PaCA: some columns of the weight, trained in place (Woo et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, NeedsBaseError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_matrix
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.places import checked_numbers
from loratools.linalg.entries import channel_weights, first_largest
from loratools.linalg.lines import columns_of, energies, units
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_PLACE = 8  # bytes of a column's number, int64 as the authors' buffer has it


@dataclass(frozen=True)
class PaCAOptions:
    """`rank`: how many columns."""

    rank: int = 8

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"paca: rank is {self.rank}; it must be 1 or more")


@final
@dataclass(frozen=True, eq=False)
class PaCA(Fittable):
    """paca_w (m, r), times the scale, stands in the place of the columns paca_indices (r,) of the base weight.

    It is a replacement and no delta: of a quantised base the delta is that to its dequantised weight.
    """

    family: ClassVar[str] = "paca"
    required: ClassVar[frozenset[str]] = frozenset({"paca_w", "paca_indices"})
    needs_base: ClassVar[bool] = True
    Options: ClassVar[type[PaCAOptions]] = PaCAOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "r columns of W + delta, in the place of those of W"
    count: ClassVar[str] = "m r, and r places"
    paper: ClassVar[str] = "Woo et al. 2025, ICLR"
    fits_with_base: ClassVar[bool] = True

    columns: Tensor
    indices: Tensor
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> PaCA:
        return cls(parameters["paca_w"], parameters["paca_indices"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        columns, indices = specs["paca_w"], specs["paca_indices"]
        if len(columns.shape) != 2 or not columns.numel or not columns.dtype.startswith(("F", "BF")):
            return f"paca_w of {columns.dtype} {columns.shape} holds no columns of real numbers"
        if indices.shape != columns.shape[1:]:
            return f"paca_indices {indices.shape} are not the places of {columns.shape[1]} columns"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["paca_w"].shape[1]

    def parameters(self) -> dict[str, Tensor]:
        return {"paca_w": self.columns, "paca_indices": self.indices}

    def operator(self, base: Tensor | None = None) -> Operator:
        weight = base_matrix("PaCA", base, self.layout)
        (m, n), problem = weight.shape, f"of the base weight {tuple(weight.shape)}; is it the right base?"
        if self.columns.shape[0] != m:
            raise AdapterError(f"paca_w {tuple(self.columns.shape)} holds no columns {problem}")
        which = checked_numbers(self.indices, n, f"paca_indices are not different columns {problem}")
        return LowRank(self.columns.double() * self.scale - weight[:, which], units(which, n).T)

    @classmethod
    def encode(cls, source: Source, options: PaCAOptions) -> PaCA:
        if source.base is None:
            raise NeedsBaseError("PaCA keeps columns of the trained weight, and needs the base weight")
        which = first_largest(energies(source.delta, channel_weights(source.squares))[1], options.rank)
        weight = base_matrix("PaCA", source.base, source.layout)
        columns = weight[:, which] + columns_of(source.delta, which)
        return cls(cast_to(columns, source.stored), which.to(torch.int64), 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> PaCAOptions | None:
        m, n = source.shape
        rank = min(nbytes // (m * source.stored.itemsize + _PLACE), n)
        return PaCAOptions(rank) if rank else None

    @classmethod
    def size(cls, source: Source, options: PaCAOptions) -> int:
        m, n = source.shape
        return min(options.rank, n) * (m * source.stored.itemsize + _PLACE)
