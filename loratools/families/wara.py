"""WaRA: one low-rank map shared by all Haar sub-bands of the input, which is delta = (B A) (x) I_2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.linalg.svd import truncate
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@dataclass(frozen=True)
class WaRAOptions:
    """`rank`: of B A; None for the rank that the projection has, where the delta is a product of factors."""

    rank: int | None = None


@final
@dataclass(frozen=True, eq=False)
class WaRA(Fittable):
    """wara_down (r, n / 2), wara_up (m / 2, r): each entry of up @ down times I_2, on neighbours 2 i and 2 i + 1.

    Version 1 of the paper transforms the input, and gives all sub-bands one map: delta = T^T (I_2 (x) B A) T.
    With Haar's the rest collapses to (B A) (x) I_2, each entry on two neighbouring rows and columns. In
    version 2 a map that the bands share commutes with the transform, for that is one of tokens: it is a plain LoRA.
    """

    family: ClassVar[str] = "wara"
    required: ClassVar[frozenset[str]] = frozenset({"wara_down", "wara_up"})
    scaled: ClassVar[tuple[str, ...]] = ("wara_up",)
    Options: ClassVar[type[WaRAOptions]] = WaRAOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "(B A) (x) I_2"
    count: ClassVar[str] = "r (m + n) / 2"
    paper: ClassVar[str] = "WaRA, arXiv 2506.24092, version 1"
    reconstruction: ClassVar[str] = (
        "no code is published; Haar's wavelet, one level and a scale of 1 are this project's choice, and the collapse "
        "to (B A) (x) I_2 follows from a figure of version 1"
    )

    down: Tensor
    up: Tensor
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> WaRA:
        return cls(parameters["wara_down"], parameters["wara_up"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        down, up = specs["wara_down"].shape, specs["wara_up"].shape
        fits = len(down) == len(up) == 2 and down[0] == up[1] and 0 not in down + up
        return None if fits else f"wara_up {up} and wara_down {down} do not chain"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["wara_down"].shape[0]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        sides = 2 * specs["wara_up"].shape[0], 2 * specs["wara_down"].shape[1]
        return layout.shape or (sides[::-1] if layout.transposed else sides)

    def parameters(self) -> dict[str, Tensor]:
        return {"wara_down": self.down, "wara_up": self.up}

    def operator(self, base: Tensor | None = None) -> Operator:
        """Of rank 2 r."""
        return LowRank(_doubled(self.up), _doubled(self.down), self.scale)

    @classmethod
    def encode(cls, source: Source, options: WaRAOptions) -> WaRA:
        """The projection averages the even and the odd diagonal of each 2 x 2 block; what is left is truncated."""
        m, n = source.shape
        if m % 2 or n % 2:
            raise AdapterError(f"WaRA pairs channels, and a {m} x {n} delta has an odd side")
        delta, rank = source.delta, options.rank
        if isinstance(delta, LowRank):
            left, right = delta.left.double() * (delta.scale / 2), delta.right.double()
            mean: Operator = LowRank(
                torch.cat([left[0::2], left[1::2]], dim=1), torch.cat([right[:, 0::2], right[:, 1::2]])
            )
        else:
            dense = delta.to(torch.float64).dense()
            mean = Dense((dense[0::2, 0::2] + dense[1::2, 1::2]) / 2)
        if rank is None:
            if not isinstance(mean, LowRank):
                raise AdapterError("the delta is no product of factors; say of which rank it should become: rank=N")
            rank = mean.rank
        best = truncate(mean, min(rank, m // 2, n // 2), seed=source.seed).operator
        assert isinstance(best, LowRank)
        down, up = (cast_to(t, source.stored) for t in (best.right, best.left * best.scale))
        return cls(down, up, 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> WaRAOptions | None:
        m, n = source.shape
        rank = nbytes // ((m + n) // 2 * source.stored.itemsize)
        return WaRAOptions(min(rank, m // 2, n // 2)) if rank and m > 1 and n > 1 else None

    @classmethod
    def size(cls, source: Source, options: WaRAOptions) -> int:
        m, n = source.shape
        most = min(2 * source.rank, m // 2, n // 2)  # both halves of the factors, side by side
        rank = min(options.rank or most, most)
        return rank * (m + n) // 2 * source.stored.itemsize

    @classmethod
    def expected_energy(cls, source: Source, options: WaRAOptions) -> float:
        """The share of the dimensions: what the projection keeps of a generic delta before B A is of low rank."""
        return 0.25


def _doubled(factor: Tensor) -> Tensor:
    """factor (x) I_2, float64."""
    rows, columns = factor.shape
    two = torch.eye(2, dtype=torch.float64)
    return (factor.double()[:, None, :, None] * two[None, :, None, :]).reshape(2 * rows, 2 * columns)
