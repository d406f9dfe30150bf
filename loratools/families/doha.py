"""DoRA on LoHa: weight' = magnitude * V / ||V||, V = base + LoHa (LyCORIS `dora_wd`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.families.loha import LoHa
from loratools.families.magnitude import decomposed, magnitude_problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.operators import Operator
    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class DoHa(Update):
    """A LoHa direction with a magnitude for each output (`magnitude_axis` 0) or each input channel (1)."""

    family: ClassVar[str] = "doha"
    required: ClassVar[frozenset[str]] = LoHa.required | {"magnitude"}
    optional: ClassVar[frozenset[str]] = LoHa.optional
    needs_base: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("hada_w1_a",)

    direction: LoHa
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
    ) -> DoHa:
        slots = {slot: tensor for slot, tensor in parameters.items() if slot != "magnitude"}
        return cls(LoHa.from_parameters(slots, scale=scale, layout=layout), parameters["magnitude"])

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        slots = {slot: spec for slot, spec in specs.items() if slot != "magnitude"}
        if problem := LoHa.check(slots, layout):
            return problem
        return magnitude_problem(specs["magnitude"], LoHa.base_shape(slots, layout), layout)

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return LoHa.rank_of(specs, layout)

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        return LoHa.base_shape(specs, layout)

    def parameters(self) -> dict[str, Tensor]:
        return {**self.direction.parameters(), "magnitude": self.magnitude}

    def operator(self, base: Tensor | None = None) -> Operator:
        return decomposed("LoHa with a magnitude", self.direction.operator(), self.magnitude, base, self.layout)
