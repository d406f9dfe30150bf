"""MiSS, formerly Bone: one small block, repeated along the inputs (Kang & Yin 2024, arXiv 2409.15371; PEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_matrix, base_size
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class MiSS(Update):
    """miss_block (r, m): delta[i, j] = block[j mod r, i], of rank r at most.

    (r, c), c dividing m, where the setting `mini` says that it is repeated along the outputs too. (m / r, r, r) is the
    kind that PEFT calls bat: each r x r block W of the base in row p becomes W + W @ M_p + M_p.
    """

    family: ClassVar[str] = "miss"
    required: ClassVar[frozenset[str]] = frozenset({"miss_block"})
    needs_base: ClassVar[bool] = True

    block: Tensor
    mini: bool
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> MiSS:
        return cls(parameters["miss_block"], bool(settings.get("mini")), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        shape = specs["miss_block"].shape
        fits = 0 not in shape and (len(shape) == 2 or (len(shape) == 3 and shape[1] == shape[2]))
        return None if fits else f"miss_block {shape} is neither (r, outputs) nor (blocks, r, r)"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["miss_block"].shape[-2]

    def parameters(self) -> dict[str, Tensor]:
        return {"miss_block": self.block}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("MiSS", base, self.layout)
        block = self.block.double()
        if block.ndim == 3:
            return Dense(self._rotated(block, base_matrix("MiSS", base, self.layout)) * self.scale)
        repeats, rest = divmod(m, block.shape[1])
        if rest or not repeats or (repeats > 1 and not self.mini) or len(block) > n:
            raise self._misfit(m, n)
        places = torch.arange(n) % len(block)
        spread = torch.nn.functional.one_hot(places, len(block)).T.double()  # (r, n)
        return LowRank(block.repeat(1, repeats).T, spread, self.scale)

    def _rotated(self, block: Tensor, matrix: Tensor) -> Tensor:
        (m, n), r = matrix.shape, block.shape[1]
        if m != len(block) * r or n % r:
            raise self._misfit(m, n)
        blocks = matrix.reshape(m // r, r, n // r, r).transpose(1, 2)  # (m / r, n / r, r, r)
        change = blocks @ block.unsqueeze(1) + block.unsqueeze(1)
        return change.transpose(1, 2).reshape(m, n)

    def _misfit(self, m: int, n: int) -> AdapterError:
        return AdapterError(
            f"the base weight is ({m}, {n}) where miss_block is {tuple(self.block.shape)}; is it the right base?"
        )
