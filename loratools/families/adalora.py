"""AdaLoRA: delta = scale * up @ diag(singular) @ down, with ranks pruned in training (Zhang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class AdaLoRA(Update):
    """down (r, n), n over input channels and kernel taps; singular (r, 1); up (m, r). All r may have been pruned."""

    family: ClassVar[str] = "adalora"
    required: ClassVar[frozenset[str]] = frozenset({"down", "singular", "up"})

    down: Tensor
    singular: Tensor
    up: Tensor
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> AdaLoRA:
        return cls(parameters["down"], parameters["singular"], parameters["up"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        down, singular, up = (specs[slot].shape for slot in ("down", "singular", "up"))
        fits = len(down) == len(up) == 2 and down[0] == up[1] and singular == (down[0], 1) and down[1] and up[0]
        return None if fits else f"down {down}, singular {singular} and up {up} do not chain"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["down"].shape[0]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        shape = (specs["up"].shape[0], specs["down"].shape[1])
        return shape[::-1] if layout.transposed else shape

    def parameters(self) -> dict[str, Tensor]:
        return {"down": self.down, "singular": self.singular, "up": self.up}

    def operator(self, base: Tensor | None = None) -> Operator:
        left, right = self.up.double(), self.singular.double() * self.down.double()
        if not len(right):  # an operator has at least one term
            left, right = left.new_zeros(len(left), 1), torch.zeros(1, right.shape[1], dtype=right.dtype)
        return LowRank(left, right, self.scale)
