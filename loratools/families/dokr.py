"""DoRA on LoKr: weight' = magnitude * V / ||V||, V = base + LoKr (LyCORIS `dora_wd`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.families.lokr import LoKr
from loratools.families.magnitude import Decomposed, decomposed

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.families.base import Update
    from loratools.operators import Operator


@final
@dataclass(frozen=True, eq=False)
class DoKr(Decomposed):
    """A LoKr direction with a magnitude for each output (`magnitude_axis` 0) or each input channel (1)."""

    family: ClassVar[str] = "dokr"
    inner: ClassVar[type[Update]] = LoKr
    required: ClassVar[frozenset[str]] = LoKr.required | {"magnitude"}
    optional: ClassVar[frozenset[str]] = LoKr.optional
    scaled: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w1_a")

    direction: LoKr
    magnitude: Tensor

    def operator(self, base: Tensor | None = None) -> Operator:
        return decomposed("LoKr with a magnitude", self.direction.operator(), self.magnitude, base, self.layout)
