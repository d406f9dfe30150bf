"""LoRA of fused projections, each with its own factors: loralib's MergedLinear, LitGPT's qkv, AdapterHub's c_attn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.families.lora import LoRA
from loratools.operators import Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class MergedLoRA(Update):
    """delta = scale * up_j @ down_j in the rows of each updated block j of `layout.blocks`, 0 in the others.

    merged_down (g * r, n) and merged_up (rows of the g updated blocks, r): the j-th of each, one after another.
    """

    family: ClassVar[str] = "merged_lora"
    required: ClassVar[frozenset[str]] = frozenset({"merged_down", "merged_up"})
    scaled: ClassVar[tuple[str, ...]] = ("merged_up",)

    down: Tensor
    up: Tensor
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> MergedLoRA:
        return cls(parameters["merged_down"], parameters["merged_up"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        if any(not s.dtype.startswith(("F", "BF")) for s in specs.values()):
            return "factors must hold floating-point numbers"
        down, up = specs["merged_down"].shape, specs["merged_up"].shape
        if len(down) != 2 or len(up) != 2 or 0 in down or 0 in up:
            return f"factors of shape {up} and {down} hold no rank"
        sizes = [size for size, updated in layout.blocks if updated]
        if not sizes or down[0] != len(sizes) * up[1] or up[0] != sum(sizes):
            return f"up {up} and down {down} do not hold {len(sizes)} projections of {sum(sizes)} rows"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["merged_up"].shape[1]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        shape = (sum(size for size, _ in layout.blocks), specs["merged_down"].shape[1])
        return shape[::-1] if layout.transposed else shape

    def parameters(self) -> dict[str, Tensor]:
        return {"merged_down": self.down, "merged_up": self.up}

    def expanded(self) -> LoRA:
        """The same delta and scale as one LoRA of rank g * r, whose up factor is block diagonal; exact."""
        rank = self.up.shape[1]
        up = torch.zeros(sum(size for size, _ in self.layout.blocks), self.down.shape[0], dtype=self.up.dtype)
        row = taken = column = 0
        for size, updated in self.layout.blocks:
            if updated:
                up[row : row + size, column : column + rank] = self.up[taken : taken + size]
                taken += size
                column += rank
            row += size
        return LoRA(self.down, up, self.scale, replace(self.layout, blocks=()))

    def operator(self, base: Tensor | None = None) -> Operator:
        return self.expanded().operator()
