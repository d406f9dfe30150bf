"""DoRA on LoHa: weight' = magnitude * V / ||V||, V = base + LoHa (LyCORIS `dora_wd`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.families.loha import LoHa
from loratools.families.magnitude import Decomposed, decomposed

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.families.base import Update
    from loratools.operators import Operator


@final
@dataclass(frozen=True, eq=False)
class DoHa(Decomposed):
    """A LoHa direction with a magnitude for each output (`magnitude_axis` 0) or each input channel (1)."""

    family: ClassVar[str] = "doha"
    inner: ClassVar[type[Update]] = LoHa
    required: ClassVar[frozenset[str]] = LoHa.required | {"magnitude"}
    optional: ClassVar[frozenset[str]] = LoHa.optional
    scaled: ClassVar[tuple[str, ...]] = ("hada_w1_a",)

    direction: LoHa
    magnitude: Tensor

    def operator(self, base: Tensor | None = None) -> Operator:
        return decomposed("LoHa with a magnitude", self.direction.operator(), self.magnitude, base, self.layout)
