"""Diagonal OFT as LyCORIS and kohya store it: the outputs are rotated in blocks (arXiv 2306.07280)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_matrix
from loratools.families.rotations import check_outputs, constraint_of, rescale_problem, rotated, rotations
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class LycorisOFT(Update):
    """delta = rescale * R^T base - base, R the rotations of oft_blocks (k, b, b), k * b = m; rescale (m, *ones)."""

    family: ClassVar[str] = "oft_lycoris"
    required: ClassVar[frozenset[str]] = frozenset({"oft_blocks"})
    optional: ClassVar[frozenset[str]] = frozenset({"rescale"})
    needs_base: ClassVar[bool] = True

    blocks: Tensor
    rescale: Tensor | None
    constraint: float
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> LycorisOFT:
        return cls(parameters["oft_blocks"], parameters.get("rescale"), constraint_of(settings), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        shape = specs["oft_blocks"].shape
        if len(shape) != 3 or 0 in shape or shape[1] != shape[2]:
            return f"oft_blocks of shape {shape} are no square blocks"
        return rescale_problem(specs, shape[0] * shape[1])

    def parameters(self) -> dict[str, Tensor]:
        return {"oft_blocks": self.blocks, **({} if self.rescale is None else {"rescale": self.rescale})}

    def operator(self, base: Tensor | None = None) -> Operator:
        matrix = base_matrix("OFT", base, self.layout)
        blocks, size = self.blocks.shape[:2]
        check_outputs(matrix, blocks * size)
        r = rotations(self.blocks, self.constraint, blocks * size)
        rows = (r.mT @ matrix.reshape(blocks, size, -1)).reshape(matrix.shape)
        return Dense(rotated(rows, self.rescale, matrix))
