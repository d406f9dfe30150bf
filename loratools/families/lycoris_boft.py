"""BOFT as LyCORIS stores it: the outputs are rotated in butterfly stages (arXiv 2311.06243)."""

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
class LycorisBOFT(Update):
    """delta = rescale * B_s ... B_1 base - base; stage i rotates by boft_blocks[i] (k, b, b), k * b = m, outputs that
    are 2^i * b / 2 apart. b is even, and k a multiple of 2^(s - 1)."""

    family: ClassVar[str] = "boft_lycoris"
    required: ClassVar[frozenset[str]] = frozenset({"boft_blocks"})
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
    ) -> LycorisBOFT:
        return cls(parameters["boft_blocks"], parameters.get("rescale"), constraint_of(settings), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        shape = specs["boft_blocks"].shape
        if len(shape) != 4 or 0 in shape or shape[2] != shape[3]:
            return f"oft_blocks of shape {shape} are no stages of square blocks"
        stages, blocks, size, _ = shape
        if size % 2 or blocks.bit_length() < stages or blocks % 2 ** (stages - 1):
            return f"oft_blocks of shape {shape} make no butterfly"
        return rescale_problem(specs, blocks * size)

    def parameters(self) -> dict[str, Tensor]:
        return {"boft_blocks": self.blocks, **({} if self.rescale is None else {"rescale": self.rescale})}

    def operator(self, base: Tensor | None = None) -> Operator:
        matrix = base_matrix("BOFT", base, self.layout)
        _, blocks, size, _ = self.blocks.shape
        check_outputs(matrix, blocks * size)
        rows = matrix
        for i, r in enumerate(rotations(self.blocks, self.constraint, blocks * size)):
            apart = 2**i * size // 2
            paired = rows.reshape(-1, 2, apart, matrix.shape[1]).transpose(1, 2)
            turned = r @ paired.reshape(blocks, size, -1)
            rows = turned.reshape(-1, apart, 2, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)
        return Dense(rotated(rows, self.rescale, matrix))
