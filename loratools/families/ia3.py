"""(IA)^3: weight' = weight times one number for each output, or for each input (Liu et al. 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_matrix
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class IA3(Update):
    """ia3_l (m, 1), or (1, n) of a feed-forward module; of a convolution (1, channels, *ones) for either.

    The setting `feedforward` says which, where the shape does not. The bias is multiplied with the outputs.
    """

    family: ClassVar[str] = "ia3"
    required: ClassVar[frozenset[str]] = frozenset({"ia3_l"})
    needs_base: ClassVar[bool] = True

    factors: Tensor
    on_inputs: bool
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> IA3:
        factors, on_inputs = parameters["ia3_l"], bool(settings.get("feedforward"))
        if factors.ndim == 2 and factors.numel() > 1:
            on_inputs = factors.shape[0] == 1
        return cls(factors, on_inputs, scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        shape = specs["ia3_l"].shape
        fits = len(shape) >= 2 and 1 in shape[:2] and set(shape[2:]) <= {1} and 0 not in shape
        return None if fits else f"ia3_l {shape} is no row and no column"

    def parameters(self) -> dict[str, Tensor]:
        return {"ia3_l": self.factors}

    def operator(self, base: Tensor | None = None) -> Operator:
        matrix = base_matrix("IA3", base, self.layout)
        assert base is not None
        change = self.factors.double().flatten() - 1
        if not self.on_inputs:
            if len(change) != len(matrix):
                raise self._misfit(base)
            return Dense(change.unsqueeze(1) * matrix * self.scale)
        taps = math.prod(base.shape[2:])
        channels = matrix.shape[1] // taps
        groups, rest = divmod(len(change), channels)  # of a grouped convolution, whose weight holds one group's inputs
        if rest or not groups or len(matrix) % groups or (groups > 1 and base.ndim < 3):
            raise self._misfit(base)
        rows = change.reshape(groups, channels).repeat_interleave(taps, dim=1)
        return Dense(rows.repeat_interleave(len(matrix) // groups, dim=0) * matrix * self.scale)

    def bias_delta(self, bias: Tensor | None = None) -> Tensor | None:
        if bias is None or self.on_inputs:
            return None
        change = self.factors.double().flatten() - 1
        if change.shape != bias.shape:
            raise AdapterError(f"the base bias is {tuple(bias.shape)} where ia3_l holds {len(change)} numbers")
        return (change * bias.double() * self.scale).to(torch.float32)

    def _misfit(self, base: Tensor) -> AdapterError:
        side = "inputs" if self.on_inputs else "outputs"
        return AdapterError(
            f"the base weight is {tuple(base.shape)} where ia3_l holds {self.factors.numel()} numbers for its {side}; "
            "is it the right base?"
        )
