"""VeRA: delta = diag(b) @ B[:m] @ diag(d) @ A[:, :n], A and B random and shared (Kopiczko et al. 2024)."""

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

_SHARED = ("vera_A", "vera_B")


@final
@dataclass(frozen=True, eq=False)
class VeRA(Update):
    """lambda_b (m,) and lambda_d (r,); of A (r, widest input) and B (widest output, r), each target takes what fits its
    base weight, so that its shape is needed. Projections that were not saved are drawn from their seed."""

    family: ClassVar[str] = "vera"
    required: ClassVar[frozenset[str]] = frozenset({"vera_lambda_b", "vera_lambda_d"})
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
    ) -> VeRA:
        b, d = parameters["vera_lambda_b"], parameters["vera_lambda_d"]
        return cls(b, d, Projections.of(parameters, _SHARED, len(d), len(d), settings), scale, layout)

    @classmethod
    def redrawn(cls, settings: Settings) -> frozenset[str]:
        return cls.references if "seed" in settings else frozenset()

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        return check_vectors(specs)

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["vera_lambda_d"].shape[0]

    def parameters(self) -> dict[str, Tensor]:
        return {"vera_lambda_b": self.lambda_b, "vera_lambda_d": self.lambda_d}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("VeRA", base, self.layout)
        return scaled(
            self.lambda_b,
            self.lambda_d,
            *self.projections.cut(m, n, torch.float32 if base is None else base.dtype),
            self.scale,
        )
