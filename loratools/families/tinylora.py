"""TinyLoRA: delta = B @ (sum of v_i P_i) @ A, of which only v is trained (PEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.families.stated import seed_of
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_V = "tinylora_v"


@final
@dataclass(frozen=True, eq=False)
class TinyLoRA(Update):
    """A (r, n) and B (m, r), from the base's singular vectors; P (u, r, r), random; v (u,), shared by some targets.

    The setting `seed` is that of P, by torch's generator of random numbers: a P that was stored must be the one drawn
    from it, or the target has been given the v of another; unless there is only `one_vector`. `known_order`: whether
    seeds are known without a P that confirms them.
    """

    family: ClassVar[str] = "tinylora"
    required: ClassVar[frozenset[str]] = frozenset({"tinylora_A", "tinylora_B"})
    optional: ClassVar[frozenset[str]] = frozenset({"tinylora_P"})
    references: ClassVar[frozenset[str]] = frozenset({_V})

    tensors: Mapping[str, Tensor]
    v: Tensor
    projections: Tensor
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> TinyLoRA:
        tensors, v = {slot: t for slot, t in parameters.items() if slot != _V}, parameters[_V]
        rank = len(tensors["tinylora_A"])
        if v.ndim != 1:
            raise AdapterError(f"{_V} {tuple(v.shape)} is no vector")
        stored = tensors.get("tinylora_P")
        if stored is None and not settings.get("known_order", True):
            raise AdapterError(
                "its projections were not saved, and cannot be drawn again without the order of the model's modules; "
                "load it with PEFT, set save_projection in its config and save it again"
            )
        if stored is not None and settings.get("one_vector"):
            return cls(tensors, v, stored, scale, layout)
        drawn = torch.normal(
            0.0, rank**-0.5, size=(len(v), rank, rank), generator=torch.Generator().manual_seed(seed_of(settings))
        )
        if stored is None:
            return cls(tensors, v, drawn, scale, layout)
        if stored.shape != drawn.shape or not torch.allclose(stored.float(), drawn, rtol=1e-2, atol=1e-2):
            raise AdapterError(
                "its projections are not those of its place among the model's modules, so that it cannot be told which "
                "vector is its own; load it with PEFT, and convert it to a LoRA there"
            )
        return cls(tensors, v, stored, scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        a, b = specs["tinylora_A"].shape, specs["tinylora_B"].shape
        if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b or a[0] != b[1]:
            return f"tinylora_A {a} and tinylora_B {b} do not chain"
        if projections := specs.get("tinylora_P"):
            shape = projections.shape
            if len(shape) != 3 or shape[1:] != (a[0], a[0]) or 0 in shape:
                return f"tinylora_P {shape} does not fit a rank of {a[0]}"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["tinylora_A"].shape[0]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        shape = (specs["tinylora_B"].shape[0], specs["tinylora_A"].shape[1])
        return shape[::-1] if layout.transposed else shape

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def operator(self, base: Tensor | None = None) -> Operator:
        core = torch.einsum("u,uij->ij", self.v.double(), self.projections.double())
        return LowRank(self.tensors["tinylora_B"].double() @ core, self.tensors["tinylora_A"].double(), self.scale)
