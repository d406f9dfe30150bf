"""Uni-LoRA: every entry of all factors is one of the few numbers of a single vector (Li et al. 2025; PEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_THETA = "unilora_theta_d"


@final
@dataclass(frozen=True, eq=False)
class UniLoRA(Update):
    """Indices A (r, n) and B (m, r) into the shared vector (d,), and scales of the same shapes: A = theta[indices] *
    scales, B likewise, delta = B @ A."""

    family: ClassVar[str] = "unilora"
    required: ClassVar[frozenset[str]] = frozenset(
        {"unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B"}
    )
    references: ClassVar[frozenset[str]] = frozenset({_THETA})

    tensors: Mapping[str, Tensor]
    theta: Tensor
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> UniLoRA:
        tensors, theta = {slot: t for slot, t in parameters.items() if slot != _THETA}, parameters[_THETA]
        for side in "AB":
            indices = tensors[f"unilora_indices_{side}"].long()
            if theta.ndim != 1 or int(indices.min()) < 0 or int(indices.max()) >= len(theta):
                raise AdapterError(f"unilora_indices_{side} names numbers that {_THETA} {tuple(theta.shape)} lacks")
        return cls(tensors, theta, scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        a, b = specs["unilora_indices_A"].shape, specs["unilora_indices_B"].shape
        if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b or a[0] != b[1]:
            return f"indices A {a} and B {b} do not chain"
        for side, shape in (("A", a), ("B", b)):
            if (scales := specs[f"unilora_scales_{side}"].shape) != shape:
                return f"the scales {scales} are not one for each index {shape} of {side}"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["unilora_indices_A"].shape[0]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        shape = (specs["unilora_indices_B"].shape[0], specs["unilora_indices_A"].shape[1])
        return shape[::-1] if layout.transposed else shape

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def operator(self, base: Tensor | None = None) -> Operator:
        a, b = (
            self.theta.double()[self.tensors[f"unilora_indices_{side}"].long()]
            * self.tensors[f"unilora_scales_{side}"].double()
            for side in "AB"
        )
        return LowRank(b, a, self.scale)
