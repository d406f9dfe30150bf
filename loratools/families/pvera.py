"""PVeRA: a VeRA whose hidden layer is a normal distribution; the delta is that of its mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_size
from loratools.families.random_projections import Projections, check_vectors, scaled
from loratools.operators import Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_SHARED = ("pvera_A", "pvera_B")


@final
@dataclass(frozen=True, eq=False)
class PVeRA(Update):
    """As VeRA, with lambda_d (2r,) and A (2r, widest input): the first halves make the mean, the second ones the
    logarithm of the variance, which is no part of the delta."""

    family: ClassVar[str] = "pvera"
    required: ClassVar[frozenset[str]] = frozenset({"pvera_lambda_b", "pvera_lambda_d"})
    references: ClassVar[frozenset[str]] = frozenset(_SHARED)
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True

    lambda_b: Tensor
    lambda_d: Tensor
    projections: Projections
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> PVeRA:
        b, d = parameters["pvera_lambda_b"], parameters["pvera_lambda_d"]
        return cls(b, d, Projections.of(parameters, _SHARED, len(d) // 2, len(d), settings), scale, layout)

    @classmethod
    def redrawn(cls, settings: Settings) -> frozenset[str]:
        return cls.references if "seed" in settings else frozenset()

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        count = specs["pvera_lambda_d"].numel
        return check_vectors(specs) or (f"pvera_lambda_d holds {count} numbers, not two halves" if count % 2 else None)

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["pvera_lambda_d"].shape[0] // 2

    def parameters(self) -> dict[str, Tensor]:
        return {"pvera_lambda_b": self.lambda_b, "pvera_lambda_d": self.lambda_d}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("PVeRA", base, self.layout)
        a, b = self.projections.cut(m, n, torch.float32 if base is None else base.dtype)
        rank = self.projections.rank
        return scaled(self.lambda_b, self.lambda_d[:rank], a[:rank], b, self.scale)
