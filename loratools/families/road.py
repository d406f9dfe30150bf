"""RoAd: weight' = R @ weight, R of scaled plane rotations of the outputs (Liao & Monz 2024, arXiv 2409.00119; PEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_matrix
from loratools.families.stated import whole_of
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class RoAd(Update):
    """road_theta and road_alpha: angles and lengths, m / 2, m or 2 m of each.

    Output i of the first half of a group is paired with output i of its second half. The setting `variant` is 1, 2 or
    4: how many angles (and lengths) each pair has; `group` is the size of a group. The bias is rotated too.
    """

    family: ClassVar[str] = "road"
    required: ClassVar[frozenset[str]] = frozenset({"road_theta", "road_alpha"})
    needs_base: ClassVar[bool] = True

    angles: Tensor
    lengths: Tensor
    variant: int
    group: int
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> RoAd:
        angles, variant, group = (
            parameters["road_theta"],
            whole_of(settings, "variant", 1),
            whole_of(settings, "group", 1),
        )
        if angles.numel() * 2 % (variant * group):
            raise AdapterError(f"{angles.numel()} angles do not fill groups of {group} outputs in variant {variant}")
        return cls(angles, parameters["road_alpha"], variant, group, scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        angles, lengths = specs["road_theta"].shape, specs["road_alpha"].shape
        fits = angles == lengths and len(angles) == 1 and 0 not in angles
        return None if fits else f"road_theta {angles} and road_alpha {lengths} are not a number for each angle"

    def parameters(self) -> dict[str, Tensor]:
        return {"road_theta": self.angles, "road_alpha": self.lengths}

    def operator(self, base: Tensor | None = None) -> Operator:
        return Dense(self._change(base_matrix("RoAd", base, self.layout)) * self.scale)

    def bias_delta(self, bias: Tensor | None = None) -> Tensor | None:
        if bias is None:
            return None
        return (self._change(bias.double().unsqueeze(1)).squeeze(1) * self.scale).to(torch.float32)

    def _change(self, rows: Tensor) -> Tensor:
        """(R - I) @ rows."""
        cosine, sine = self._columns()
        if len(rows) != len(cosine):
            raise AdapterError(f"the base has {len(rows)} outputs where the angles are for {len(cosine)}")
        first, second = rows.reshape(-1, 2, self.group // 2, rows.shape[1]).unbind(1)
        turned = torch.stack([-second, first], dim=1).reshape(rows.shape)
        return (cosine - 1).unsqueeze(1) * rows + sine.unsqueeze(1) * turned

    def _columns(self) -> tuple[Tensor, Tensor]:
        """For each output, what multiplies itself and what multiplies its turned partner."""
        angles, lengths = self.angles.double(), self.lengths.double()
        if self.variant == 4:
            (first, second), (near, far) = (t.reshape(-1, 2, self.group).unbind(1) for t in (angles, lengths))
            return (near * first.cos()).flatten(), (far * second.sin()).flatten()
        if self.variant == 1:
            angles, lengths = (t.reshape(-1, 1, self.group // 2).repeat(1, 2, 1).flatten() for t in (angles, lengths))
        return lengths * angles.cos(), lengths * angles.sin()
