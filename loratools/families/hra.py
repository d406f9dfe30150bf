"""HRA: weight' = weight @ H, H a product of Householder reflections (Yuan et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_matrix
from loratools.linalg.rotations import reflections
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


_ROUNDING = 1e-6


@final
@dataclass(frozen=True, eq=False)
class HRA(Update):
    """hra_u (n, r): H = product over k of I - 2 u_k u_k^T, u_k of unit length, so that the delta has rank r at most.

    The setting `orthogonal` makes the u_k orthogonal first, by Gram and Schmidt (PEFT's apply_GS).
    """

    family: ClassVar[str] = "hra"
    required: ClassVar[frozenset[str]] = frozenset({"hra_u"})
    needs_base: ClassVar[bool] = True

    vectors: Tensor
    orthogonal: bool
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> HRA:
        return cls(parameters["hra_u"], bool(settings.get("orthogonal")), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        shape = specs["hra_u"].shape
        return None if len(shape) == 2 and 0 not in shape else f"hra_u {shape} holds no vectors"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["hra_u"].shape[1]

    def parameters(self) -> dict[str, Tensor]:
        return {"hra_u": self.vectors}

    def operator(self, base: Tensor | None = None) -> Operator:
        matrix = base_matrix("HRA", base, self.layout)
        if matrix.shape[1] != len(self.vectors):
            raise AdapterError(
                f"the base weight is {tuple(matrix.shape)} where hra_u has {len(self.vectors)} inputs; "
                "is it the right base?"
            )
        unit = self._unit_vectors()
        left, right = (-2 * unit, unit.T) if self.orthogonal else reflections(unit)
        return LowRank(matrix @ left, right, self.scale)

    def _unit_vectors(self) -> Tensor:
        columns: list[Tensor] = []
        for k, column in enumerate(self.vectors.double().T):
            if self.orthogonal:
                for earlier in columns:
                    column = column - (earlier @ column) * earlier
            norm = column.norm()
            if norm <= _ROUNDING * self.vectors[:, k].double().norm():  # what is left is noise of the stored dtype
                raise AdapterError(f"column {k} of hra_u has no direction of its own to reflect along")
            columns.append(column / norm)
        return torch.stack(columns, dim=1)
