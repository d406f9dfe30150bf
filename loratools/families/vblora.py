"""VB-LoRA: both factors are made of mixtures of vectors of one bank (Li et al. 2024, arXiv 2405.15179; PEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_size
from loratools.families.stated import whole_of
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_BANK = "vblora_vector_bank"
_LOGITS = ("vblora_logits_A", "vblora_logits_B")
_WHOLE = frozenset(_LOGITS)
_TOP = frozenset(f"{slot}_topk_{part}" for slot in _LOGITS for part in ("indices", "weights"))


@final
@dataclass(frozen=True, eq=False)
class VBLoRA(Update):
    """logits A (r, n / v, h) and B (m / v, r, h) over a shared bank (h, v): the softmax of the largest k mixes vectors.

    Or of each only the k indices, and the weights but for the last. The setting `topk` is k. The length v of the
    vectors is in the bank alone, so that the shape of the base weight is needed.
    """

    family: ClassVar[str] = "vblora"
    required: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = _WHOLE | _TOP
    references: ClassVar[frozenset[str]] = frozenset({_BANK})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True

    tensors: Mapping[str, Tensor]
    bank: Tensor
    topk: int
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> VBLoRA:
        tensors = {slot: t for slot, t in parameters.items() if slot != _BANK}
        bank = parameters[_BANK]
        if bank.ndim != 2 or not bank.numel():
            raise AdapterError(f"{_BANK} {tuple(bank.shape)} holds no vectors")
        return cls(tensors, bank, whole_of({"topk": 2, **settings}, "topk", 1), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        if set(specs) not in (_WHOLE, _TOP):
            return f"{', '.join(sorted(specs))} are not the logits of two factors"
        bad = [slot for slot, spec in specs.items() if len(spec.shape) != 3]
        bad += [slot for slot, spec in specs.items() if 0 in spec.shape[: 2 if slot.endswith("weights") else 3]]
        if bad:
            return f"{bad[0]} {specs[bad[0]].shape} holds no mixtures"
        for slot in _LOGITS:
            if slot not in specs:
                indices, weights = specs[f"{slot}_topk_indices"].shape, specs[f"{slot}_topk_weights"].shape
                if weights != (*indices[:2], indices[2] - 1):
                    return f"the indices {indices} and weights {weights} of {slot} do not fit together"
        a, b = (specs[slot if slot in specs else f"{slot}_topk_indices"].shape for slot in _LOGITS)
        return None if a[0] == b[1] and a[2] == b[2] else f"logits A {a} and B {b} do not chain"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return next(spec for slot, spec in specs.items() if slot.startswith(_LOGITS[0])).shape[0]

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def operator(self, base: Tensor | None = None) -> Operator:
        size = base_size("VB-LoRA", base, self.layout)
        a, b = (self._mixed(slot) for slot in _LOGITS)  # (r, n / v, v), (m / v, r, v)
        left, right = b.transpose(1, 2).flatten(0, 1), a.flatten(1)
        if (len(left), right.shape[1]) != size:
            raise AdapterError(
                f"the base weight is {size} where the factors make {(len(left), right.shape[1])}; is it the right base?"
            )
        return LowRank(left, right, self.scale)

    def _mixed(self, slot: str) -> Tensor:
        if slot in self.tensors:
            logits = self.tensors[slot].double()
            if not 1 <= self.topk <= logits.shape[2] == len(self.bank):
                raise AdapterError(
                    f"the {self.topk} largest of {logits.shape[2]} logits make no mixture of {len(self.bank)} vectors"
                )
            top, indices = logits.topk(self.topk, dim=-1)
            weights = top.softmax(-1)
        else:
            indices, weights = self.tensors[f"{slot}_topk_indices"].long(), self.tensors[f"{slot}_topk_weights"]
            weights = torch.cat([weights.double(), 1 - weights.double().sum(-1, keepdim=True)], dim=-1)
            if int(indices.min()) < 0 or int(indices.max()) >= len(self.bank):
                raise AdapterError(f"{slot} names vectors that the bank of {len(self.bank)} lacks")
        mixed = torch.zeros(*indices.shape[:2], self.bank.shape[1], dtype=torch.float64)
        for k in range(indices.shape[2]):  # one at a time: all at once would take k times the memory
            mixed += weights[..., k, None] * self.bank.double()[indices[..., k]]
        return mixed
