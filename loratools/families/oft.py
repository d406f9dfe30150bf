"""OFT: weight' = weight @ R^T, R block-diagonal and orthogonal, from PEFT's triangles (Qiu et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_matrix
from loratools.linalg.rotations import cayley, cayley_neumann, skew, skew_size, times_blocks
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_SLOTS = ("oft_R", "oft_embedding_R")


@final
@dataclass(frozen=True, eq=False)
class OFT(Update):
    """Rows of b (b - 1) / 2 numbers above the diagonal of a skew-symmetric Q (b, b), one for each of n / b blocks, or
    one that all share; an embedding table (slot `oft_embedding_R`) is multiplied with R instead.

    Settings: `terms` of the Cayley-Neumann series of (I + Q)(I - Q)^-1, or None for the exact (I - Q)(I + Q)^-1, whose
    Q has the opposite sign; `radius` that bounds the norm of Q (COFT), or None; `shared`.
    """

    family: ClassVar[str] = "oft"
    required: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset(_SLOTS)
    needs_base: ClassVar[bool] = True

    triangles: Tensor  # (blocks, b (b - 1) / 2)
    slot: str
    terms: int | None
    radius: float | None
    shared: bool
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> OFT:
        (slot,) = (slot for slot in _SLOTS if slot in parameters)
        terms, radius, shared = (settings.get(name) for name in ("terms", "radius", "shared"))
        return cls(parameters[slot], slot, terms, radius, bool(shared), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        if len(specs) != 1:
            return "needs either oft_R or oft_embedding_R"
        ((slot, spec),) = specs.items()
        fits = len(spec.shape) == 2 and spec.shape[0] and skew_size(spec.shape[1]) is not None
        return None if fits else f"{slot} {spec.shape} holds no triangles of square matrices"

    def parameters(self) -> dict[str, Tensor]:
        return {self.slot: self.triangles}

    def operator(self, base: Tensor | None = None) -> Operator:
        of_table = self.slot == "oft_embedding_R"  # its inputs are the columns, however the operator lies in it
        matrix = base_matrix("OFT", base, Layout() if of_table else self.layout)
        size = skew_size(self.triangles.shape[1])
        assert size is not None  # checked from the header
        blocks, rest = divmod(matrix.shape[1], size)
        if rest or (blocks != len(self.triangles) and not (self.shared and len(self.triangles) == 1)):
            raise AdapterError(
                f"the base weight is {tuple(matrix.shape)} where the update holds {len(self.triangles)} blocks of "
                f"{size}; is it the right base?"
            )
        q = skew(self.triangles.double(), size)
        if self.radius is not None:
            norms = q.flatten(1).norm(dim=1)
            radius = self.radius / math.sqrt(len(q))
            q = q * torch.where(norms > radius, radius / norms, 1.0)[:, None, None]
        turn = cayley(q) if self.terms is None else cayley_neumann(q, self.terms)
        change = turn - torch.eye(size, dtype=turn.dtype)
        change = (change if of_table else change.mT).expand(blocks, size, size)
        delta = Dense(times_blocks(matrix, change) * self.scale)
        return delta.T if of_table and self.layout.transposed else delta
