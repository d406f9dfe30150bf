"""BOFT: weight' = diag(s) @ weight @ B^T, B a product of butterfly factors, in PEFT's form (Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_matrix
from loratools.linalg.rotations import cayley, times_blocks
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class BOFT(Update):
    """boft_R (factors, blocks, b, b), of which the skew-symmetric part counts; boft_s (m, 1), (1, m) of a convolution.

    Factor i is P_i D_i P_i^T, D_i of orthogonal blocks, and P_i gathers, in every stretch of b 2^i inputs, the half
    blocks in even places before those in odd ones. The last factor is leftmost.
    """

    family: ClassVar[str] = "boft"
    required: ClassVar[frozenset[str]] = frozenset({"boft_R", "boft_s"})
    needs_base: ClassVar[bool] = True

    blocks: Tensor
    gains: Tensor
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> BOFT:
        return cls(parameters["boft_R"], parameters["boft_s"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        blocks, gains = specs["boft_R"].shape, specs["boft_s"].shape
        if len(blocks) != 4 or blocks[2] != blocks[3] or 0 in blocks:
            return f"boft_R {blocks} holds no factors of square blocks"
        if len(gains) != 2 or 1 not in gains or 0 in gains:
            return f"boft_s {gains} is no row and no column"
        factors, count, size, _ = blocks
        if factors > 1 and (size % 2 or factors > count.bit_length() or count % 2 ** (factors - 1)):
            return f"{count} blocks of {size} have no {factors} butterfly factors"
        return None

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...] | None:
        _, count, size, _ = specs["boft_R"].shape
        outputs = specs["boft_s"].shape[0]
        if outputs == 1:  # perhaps a convolution, of whatever kernel
            return None
        return (count * size, outputs) if layout.transposed else (outputs, count * size)

    def parameters(self) -> dict[str, Tensor]:
        return {"boft_R": self.blocks, "boft_s": self.gains}

    def operator(self, base: Tensor | None = None) -> Operator:
        matrix = base_matrix("BOFT", base, self.layout)
        factors, count, size, _ = self.blocks.shape
        if matrix.shape != (self.gains.numel(), count * size):
            raise AdapterError(
                f"the base weight is {tuple(matrix.shape)} where the update is {(self.gains.numel(), count * size)}; "
                "is it the right base?"
            )
        turned = matrix
        raw = self.blocks.double()
        for i, turn in enumerate(cayley(0.5 * (raw - raw.mT))):
            order = _butterfly(count * size, size, i) if factors > 1 else torch.arange(count * size)
            turned = times_blocks(turned[:, torch.argsort(order)], turn.mT)[:, order]
        return Dense((self.gains.double().reshape(-1, 1) * turned - matrix) * self.scale)


def _butterfly(n: int, size: int, level: int) -> Tensor:
    """The order in which P of that level takes its inputs: half blocks in even places first, stretch by stretch."""
    return torch.arange(n).reshape(-1, 2**level, 2, size // 2).transpose(1, 2).flatten()
