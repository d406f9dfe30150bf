"""GLoRA: delta = scale * (b1 @ b2 + base @ a1 @ a2) (arXiv 2306.07967; LyCORIS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_matrix
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class GLoRA(Update):
    """a1 (n, r), a2 (r, n), b1 (m, r), b2 (r, n, *kernel), or with a Tucker core bm (r, r, *kernel), b2 (r, n).

    Of convolutions all have trailing axes; a1 and a2 mix input channels alike at every tap.
    """

    family: ClassVar[str] = "glora"
    required: ClassVar[frozenset[str]] = frozenset({"glora_a1", "glora_a2", "glora_b1", "glora_b2"})
    optional: ClassVar[frozenset[str]] = frozenset({"glora_bm"})
    needs_base: ClassVar[bool] = True

    tensors: Mapping[str, Tensor]
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> GLoRA:
        return cls(dict(parameters), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        if any(len(s.shape) < 2 or 0 in s.shape for s in specs.values()):
            return f"factors of shape {', '.join(str(s.shape) for s in specs.values())} hold no rank"
        a1, a2, b1, b2 = (specs[f"glora_{name}"].shape for name in ("a1", "a2", "b1", "b2"))
        inner = specs["glora_bm"].shape[:2] if "glora_bm" in specs else (b2[0], b2[0])
        flat = [a1, a2, b1] + ([b2] if "glora_bm" in specs else [])
        chains = a1[1] == a2[0] and a1[0] == a2[1] == b2[1] and inner == (b1[1], b2[0])
        if not chains or any(math.prod(shape[2:]) != 1 for shape in flat):
            return f"a1 {a1}, a2 {a2}, b1 {b1} and b2 {b2} do not chain"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["glora_b2"].shape[0]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        b2 = specs["glora_b2"].shape
        kernel = specs["glora_bm"].shape[2:] if "glora_bm" in specs else b2[2:]
        shape = (specs["glora_b1"].shape[0], b2[1], *kernel)
        return (shape[1], shape[0]) if layout.transposed else shape

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def operator(self, base: Tensor | None = None) -> Operator:
        """Both terms are low rank, the second because it takes its rows through a1."""
        matrix = base_matrix("GLoRA", base, self.layout)
        t = {slot: tensor.double() for slot, tensor in self.tensors.items()}
        b1, b2 = t["glora_b1"].flatten(1), t["glora_b2"].flatten(1)
        if "glora_bm" in t:
            b2 = torch.einsum("pq...,qi->pi...", t["glora_bm"], b2).flatten(1)
        a1, a2 = t["glora_a1"].flatten(1), t["glora_a2"].flatten(1)
        if matrix.shape != (b1.shape[0], b2.shape[1]):
            raise AdapterError(
                f"the base weight is {tuple(matrix.shape)} where the update is {(b1.shape[0], b2.shape[1])}"
            )
        m, taps = matrix.shape[0], matrix.shape[1] // a1.shape[0]
        through = torch.einsum("oit,ir->ort", matrix.reshape(m, a1.shape[0], taps), a1)
        if b2.shape[0] + taps * a1.shape[1] >= min(matrix.shape):
            return Dense((b1 @ b2 + torch.einsum("ort,ri->oit", through, a2).flatten(1)) * self.scale)
        right = torch.kron(a2, torch.eye(taps, dtype=a2.dtype, device=a2.device))  # (r taps, n taps)
        return LowRank(torch.cat([b1, through.flatten(1)], 1), torch.cat([b2, right]), self.scale)
