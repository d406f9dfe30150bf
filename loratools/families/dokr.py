"""DoRA on LoKr: weight' = magnitude * V / ||V||, V = base + LoKr (LyCORIS `dora_wd`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.families.lokr import LoKr
from loratools.families.magnitude import decomposed, magnitude_problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.operators import Operator
    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class DoKr(Update):
    """A LoKr direction with a magnitude for each output (`magnitude_axis` 0) or each input channel (1)."""

    family: ClassVar[str] = "dokr"
    required: ClassVar[frozenset[str]] = LoKr.required | {"magnitude"}
    optional: ClassVar[frozenset[str]] = LoKr.optional
    needs_base: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w1_a")

    direction: LoKr
    magnitude: Tensor

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.direction.scale

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        return self.direction.layout

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> DoKr:
        slots = {slot: tensor for slot, tensor in parameters.items() if slot != "magnitude"}
        return cls(LoKr.from_parameters(slots, scale=scale, layout=layout), parameters["magnitude"])

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        slots = {slot: spec for slot, spec in specs.items() if slot != "magnitude"}
        if problem := LoKr.check(slots, layout):
            return problem
        return magnitude_problem(specs["magnitude"], LoKr.base_shape(slots, layout), layout)

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return LoKr.rank_of(specs, layout)

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        return LoKr.base_shape(specs, layout)

    def parameters(self) -> dict[str, Tensor]:
        return {**self.direction.parameters(), "magnitude": self.magnitude}

    def operator(self, base: Tensor | None = None) -> Operator:
        return decomposed("LoKr with a magnitude", self.direction.operator(), self.magnitude, base, self.layout)
