"""IA3 as LyCORIS stores it: delta = base * weight, a gain for each output or input channel (arXiv 2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_matrix
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class LycorisIA3(Update):
    """weight (m,), or (n,) where the number on_input is not 0; of convolutions (1, channels, *ones)."""

    family: ClassVar[str] = "ia3_lycoris"
    required: ClassVar[frozenset[str]] = frozenset({"ia3_weight", "on_input"})
    needs_base: ClassVar[bool] = True

    weight: Tensor
    on_input: Tensor
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> LycorisIA3:
        return cls(parameters["ia3_weight"], parameters["on_input"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        shape = specs["ia3_weight"].shape
        if not shape or 0 in shape or max(shape) != specs["ia3_weight"].numel:
            return f"a weight of shape {shape} holds no gain for each channel"
        return None if specs["on_input"].numel == 1 else f"on_input holds {specs['on_input'].numel} numbers, not one"

    def parameters(self) -> dict[str, Tensor]:
        return {"ia3_weight": self.weight, "on_input": self.on_input}

    def operator(self, base: Tensor | None = None) -> Operator:
        matrix = base_matrix("IA3", base, self.layout)
        assert base is not None  # or base_matrix had raised
        gains, axis = self.weight.flatten().double(), int(bool(self.on_input.item()))
        channels = matrix.shape[axis] if base.ndim < 3 else base.shape[axis]
        if gains.numel() != channels:
            side = "inputs" if axis else "outputs"
            raise AdapterError(f"{gains.numel()} gains for the {channels} {side} of the base weight")
        gains = gains.repeat_interleave(matrix.shape[axis] // channels)  # over the taps of a convolution
        return Dense(matrix * (gains if axis else gains.unsqueeze(1)))
