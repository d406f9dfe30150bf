"""SHiRA: single entries of the weight, trained in place (Bhardwaj et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_size
from loratools.operators import MAX_DENSE_ELEMENTS, Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class SHiRA(Update):
    """shira_weight (count,) added at shira_indices (2, count), rows over columns; indices may be stored as floats.

    How large the weight is the file does not tell.
    """

    family: ClassVar[str] = "shira"
    required: ClassVar[frozenset[str]] = frozenset({"shira_weight", "shira_indices"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True

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
        if m * n > MAX_DENSE_ELEMENTS:
            raise AdapterError(f"a dense {m} x {n} matrix would hold more than {MAX_DENSE_ELEMENTS:,} numbers")
        rows, columns = self.indices.double()
        for places, size in ((rows, m), (columns, n)):
            if not bool(((places >= 0) & (places < size) & (places == places.floor())).all()):
                raise AdapterError(
                    f"shira_indices holds places outside the base weight of {(m, n)}; is it the right base?"
                )
        matrix = torch.zeros(m * n, dtype=torch.float64)
        matrix.index_add_(0, rows.long() * n + columns.long(), self.values.double())
        return Dense(matrix.reshape(m, n) * self.scale)
