"""DeLoRA: components of unit length times one strength, and the base's column norms (Bini et al. 2025; PEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_SMALLEST = 1e-4  # norms are no less, as in PEFT


@final
@dataclass(frozen=True, eq=False)
class DeLoRA(Update):
    """delora_A (r, n), delora_B (m, r), delora_lambda (1,), delora_w_norm (n,), the base's column norms as trained on.

    delta = sum over k of (lambda / r) b_k a_k^T / (|b_k| |a_k|), its columns times w_norm.
    """

    family: ClassVar[str] = "delora"
    required: ClassVar[frozenset[str]] = frozenset({"delora_A", "delora_B", "delora_lambda", "delora_w_norm"})

    tensors: Mapping[str, Tensor]
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> DeLoRA:
        return cls(dict(parameters), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        a, b = specs["delora_A"].shape, specs["delora_B"].shape
        if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
            return f"factors of shape {a} and {b} hold no rank"
        if a[0] != b[1]:
            return f"delora_A {a} and delora_B {b} do not chain"
        if specs["delora_lambda"].numel != 1:
            return f"delora_lambda {specs['delora_lambda'].shape} is not one number"
        norms = specs["delora_w_norm"].shape
        return None if norms == a[1:] else f"delora_w_norm {norms} is not a number for each of {a[1]} inputs"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["delora_A"].shape[0]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        shape = (specs["delora_B"].shape[0], specs["delora_A"].shape[1])
        return shape[::-1] if layout.transposed else shape

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def operator(self, base: Tensor | None = None) -> Operator:
        a, b, strength, norms = (self.tensors[slot].double() for slot in sorted(self.required))
        lengths = a.norm(dim=1).clamp(min=_SMALLEST) * b.norm(dim=0).clamp(min=_SMALLEST)
        return LowRank(b * (strength.flatten() / len(a) / lengths), a * norms, self.scale)
