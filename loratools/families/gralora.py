"""GraLoRA: a grid of k x k blocks, each a LoRA of rank r / k (Jung et al. 2025, arXiv 2505.20355; PEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_GENERAL = frozenset({"gralora_A_general", "gralora_B_general"})


@final
@dataclass(frozen=True, eq=False)
class GraLoRA(Update):
    """gralora_A (k, n / k, r) and gralora_B (k, r, m / k); the hybrid kind has a LoRA (h, n), (m, h) beside them.

    Block (p, q) of the delta, p along the outputs, is the product of part q of the ranks of B[p] and part p of those of
    A[q]: rank k r + h at most.
    """

    family: ClassVar[str] = "gralora"
    required: ClassVar[frozenset[str]] = frozenset({"gralora_A", "gralora_B"})
    optional: ClassVar[frozenset[str]] = _GENERAL

    tensors: Mapping[str, Tensor]
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> GraLoRA:
        return cls(dict(parameters), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        a, b = specs["gralora_A"].shape, specs["gralora_B"].shape
        if len(a) != 3 or len(b) != 3 or 0 in a or 0 in b:
            return f"gralora_A {a} and gralora_B {b} hold no blocks"
        if a[0] != b[0] or a[2] != b[1]:
            return f"gralora_A {a} and gralora_B {b} do not chain"
        if a[2] % a[0]:
            return f"rank {a[2]} does not divide among {a[0]} blocks"
        general = _GENERAL & set(specs)
        if len(general) == 1:
            return f"{min(_GENERAL - general)} is missing"
        if general:
            down, up = (specs[slot].shape for slot in sorted(_GENERAL))
            if len(down) != 2 or len(up) != 2 or 0 in down or down[0] != up[1]:
                return f"gralora_A_general {down} and gralora_B_general {up} do not chain"
            if (up[0], down[1]) != (b[0] * b[2], a[0] * a[1]):
                return f"the blocks make {(b[0] * b[2], a[0] * a[1])} and the general factors {(up[0], down[1])}"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        general = specs.get("gralora_A_general")
        return specs["gralora_A"].shape[2] + (0 if general is None else general.shape[0])

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        a, b = specs["gralora_A"].shape, specs["gralora_B"].shape
        shape = (b[0] * b[2], a[0] * a[1])
        return shape[::-1] if layout.transposed else shape

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def operator(self, base: Tensor | None = None) -> Operator:
        """One pair of columns and rows for each rank of each block, where that is shorter than dense."""
        t = {slot: tensor.double() for slot, tensor in self.tensors.items()}
        a, b = t["gralora_A"], t["gralora_B"]
        k, width, rank = a.shape
        height, part = b.shape[2], rank // k
        ups = b.reshape(k, k, part, height)  # [p, q]
        downs = a.reshape(k, width, k, part)  # [q, :, p]
        general = [t[slot] for slot in sorted(_GENERAL & set(t))]  # A, B
        extra = len(general[0]) if general else 0
        if k * rank + extra >= min(k * height, k * width):
            blocks = torch.einsum("pqto,qipt->poqi", ups, downs).reshape(k * height, k * width)
            return Dense((blocks + general[1] @ general[0] if general else blocks) * self.scale)
        here = torch.eye(k, dtype=torch.float64)
        left = torch.einsum("pqto,ps->posqt", ups, here).reshape(k * height, k * rank)
        right = torch.einsum("qipt,qs->ptsqi", downs, here).transpose(1, 2).reshape(k * rank, k * width)
        if general:
            left, right = torch.cat([left, general[1]], dim=1), torch.cat([right, general[0]])
        return LowRank(left, right, self.scale)
