"""LoHa: delta = scale * (w1_a @ w1_b) * (w2_a @ w2_b), entry by entry (FedPara, arXiv 2108.06098; LyCORIS, PEFT)."""

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


@final
@dataclass(frozen=True, eq=False)
class LoHa(Update):
    """Factors a (m, r) and b (r, n), n over input channels and kernel taps; with Tucker cores t (r, r, *kernel), a is
    (r, m) and b (r, inputs)."""

    family: ClassVar[str] = "loha"
    required: ClassVar[frozenset[str]] = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    optional: ClassVar[frozenset[str]] = frozenset({"hada_t1", "hada_t2"})
    scaled: ClassVar[tuple[str, ...]] = ("hada_w1_a",)

    tensors: Mapping[str, Tensor]
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> LoHa:
        return cls(dict(parameters), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        if ("hada_t1" in specs) != ("hada_t2" in specs):
            return "one Tucker core is missing"
        shapes = []
        for i in (1, 2):
            a, b = specs[f"hada_w{i}_a"].shape, specs[f"hada_w{i}_b"].shape
            if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
                return f"factors of shape {a} and {b} hold no rank"
            if "hada_t1" in specs:
                core = specs[f"hada_t{i}"].shape
                if core[:2] != (a[0], b[0]):
                    return f"w{i}_a {a}, t{i} {core} and w{i}_b {b} do not chain"
                shapes.append((a[1], b[1], *core[2:]))
            elif a[1] != b[0]:
                return f"w{i}_a {a} and w{i}_b {b} do not chain"
            else:
                shapes.append((a[0], b[1]))
        return None if shapes[0] == shapes[1] else f"the factors make {shapes[0]} and {shapes[1]}, which differ"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["hada_w1_b"].shape[0]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        a, b = specs["hada_w1_a"].shape, specs["hada_w1_b"].shape
        if "hada_t1" in specs:
            return (a[1], b[1], *specs["hada_t1"].shape[2:])
        return (b[1], a[0]) if layout.transposed else (a[0], b[1])

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def operator(self, base: Tensor | None = None) -> Operator:
        """The rows of products of factors (Khatri-Rao) make it low rank exactly, where that is shorter than dense."""
        t = {slot: tensor.double() for slot, tensor in self.tensors.items()}
        if "hada_t1" in t:
            first, second = (
                torch.einsum("pq...,qi,po->oi...", t[f"hada_t{i}"], t[f"hada_w{i}_b"], t[f"hada_w{i}_a"]).flatten(1)
                for i in (1, 2)
            )
            return Dense(first * second * self.scale)
        a1, b1, a2, b2 = (t[f"hada_w{i}_{side}"] for i in (1, 2) for side in "ab")
        rank = a1.shape[1] * a2.shape[1]
        if rank >= min(a1.shape[0], b1.shape[1]):
            return Dense((a1 @ b1) * (a2 @ b2) * self.scale)
        left = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)  # (m, r1 r2)
        right = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)  # (r1 r2, n)
        return LowRank(left, right, self.scale)
