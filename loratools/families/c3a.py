"""C3A: a delta of circulant blocks (Chen et al. 2024, arXiv 2407.19342; PEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class C3A(Update):
    """c3a_kernel (m / b, n / b, b): block (p, q) of the delta is [i, j] -> kernel[p, q, (j - i) mod b] / n."""

    family: ClassVar[str] = "c3a"
    required: ClassVar[frozenset[str]] = frozenset({"c3a_kernel"})

    kernel: Tensor
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> C3A:
        return cls(parameters["c3a_kernel"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        shape = specs["c3a_kernel"].shape
        return None if len(shape) == 3 and 0 not in shape else f"c3a_kernel {shape} is not (rows, columns, block size)"

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        rows, columns, size = specs["c3a_kernel"].shape
        shape = (rows * size, columns * size)
        return shape[::-1] if layout.transposed else shape

    def parameters(self) -> dict[str, Tensor]:
        return {"c3a_kernel": self.kernel}

    def operator(self, base: Tensor | None = None) -> Operator:
        rows, columns, size = self.kernel.shape
        steps = torch.arange(size)
        circulant = self.kernel.double()[:, :, (steps - steps.unsqueeze(1)) % size]  # (rows, columns, size, size)
        dense = circulant.transpose(1, 2).reshape(rows * size, columns * size)
        return Dense(dense * (self.scale / (columns * size)))
