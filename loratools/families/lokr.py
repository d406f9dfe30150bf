"""LoKr: delta = scale * w1 (x) w2, each whole or a product of factors (KronA, arXiv 2212.10650; LyCORIS, PEFT)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.operators import Dense, Kronecker, LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_WHOLE = ("lokr_w1", "lokr_w2")


@final
@dataclass(frozen=True, eq=False)
class LoKr(Update):
    """w1 (a, b) or w1_a (a, r) @ w1_b (r, b); w2 (c, d, *kernel) or w2_a (c, r) @ w2_b (r, d * taps), or with a Tucker
    core t2 (r, r, *kernel), w2_a (r, c) and w2_b (r, d)."""

    family: ClassVar[str] = "lokr"
    required: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset(
        {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
    )
    scaled: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w1_a")

    tensors: Mapping[str, Tensor]
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> LoKr:
        return cls(dict(parameters), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        for whole in _WHOLE:
            halves = {f"{whole}_a", f"{whole}_b"} & set(specs)
            if (whole in specs) == bool(halves) or len(halves) == 1:
                return f"needs either {whole} or both {whole}_a and {whole}_b"
            if halves:
                a, b = specs[f"{whole}_a"].shape, specs[f"{whole}_b"].shape
                core = specs["lokr_t2"].shape if whole == "lokr_w2" and "lokr_t2" in specs else None
                chains = a[1:] == b[:1] if core is None else core[:2] == (a[0], b[0])
                if len(a) != 2 or len(b) != 2 or 0 in (*a, *b) or not chains:
                    return f"{whole}_a {a}, {whole}_b {b}{f', lokr_t2 {core}' if core else ''} do not chain"
            elif len(specs[whole].shape) < 2 or 0 in specs[whole].shape:
                return f"{whole} of shape {specs[whole].shape} is no matrix"
        return "lokr_t2 belongs to lokr_w2_a" if "lokr_t2" in specs and "lokr_w2" in specs else None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        """Of a decomposed factor, the second before the first; 0 where both are whole."""
        for slot in ("lokr_t2", "lokr_w2_b", "lokr_w1_b"):
            if slot in specs:
                return specs[slot].shape[0]
        return 0

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        first = specs["lokr_w1"].shape if "lokr_w1" in specs else _product(specs, "lokr_w1")
        if "lokr_w2" in specs:
            second = specs["lokr_w2"].shape
        elif "lokr_t2" in specs:
            second = (specs["lokr_w2_a"].shape[1], specs["lokr_w2_b"].shape[1], *specs["lokr_t2"].shape[2:])
        else:
            second = _product(specs, "lokr_w2")
        shape = (first[0] * second[0], math.prod(first[1:]) * second[1], *second[2:])
        return (shape[1], shape[0]) if layout.transposed else shape

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def operator(self, base: Tensor | None = None) -> Operator:
        return Kronecker(self._factor("lokr_w1"), self._factor("lokr_w2"), self.scale)

    def _factor(self, whole: str) -> Operator:
        t = self.tensors
        if whole in t:
            return Dense(t[whole].flatten(1))
        if whole == "lokr_w2" and "lokr_t2" in t:
            core, a, b = (t[slot].double() for slot in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
            return Dense(torch.einsum("pq...,po,qi->oi...", core, a, b).flatten(1))
        return LowRank(t[f"{whole}_a"], t[f"{whole}_b"])


def _product(specs: Mapping[str, TensorSpec], whole: str) -> tuple[int, ...]:
    return (specs[f"{whole}_a"].shape[0], specs[f"{whole}_b"].shape[1])
