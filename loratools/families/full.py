"""Full difference: the delta itself, of any parameter (LyCORIS `diff`, `diff_b`, `w_norm`, `b_norm`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class Full(Update):
    """`diff` has the shape of the base parameter: (m, n, *kernel), or (m,) of a bias or a norm; no scale applies."""

    family: ClassVar[str] = "full"
    required: ClassVar[frozenset[str]] = frozenset({"diff"})

    diff: Tensor
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> Full:
        return cls(parameters["diff"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        shape = specs["diff"].shape
        return f"a difference of shape {shape} changes nothing" if not shape or 0 in shape else None

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        return specs["diff"].shape

    def parameters(self) -> dict[str, Tensor]:
        return {"diff": self.diff}

    def operator(self, base: Tensor | None = None) -> Operator:
        if self.diff.ndim == 1:
            return Dense(self.diff.unsqueeze(1))
        return Dense(self.diff.T if self.layout.transposed else self.diff.flatten(1))
