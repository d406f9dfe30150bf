"""Block-LoRA: delta = sum over blocks of B_k @ A, for the blocks of a rank share one A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.linalg.svd import truncate
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@dataclass(frozen=True)
class BlockLoRAOptions:
    """`rank`: of the delta, which is that of one block; None for the rank that it has. `blocks`: how many share A."""

    rank: int | None = None
    blocks: int = 2


@final
@dataclass(frozen=True, eq=False)
class BlockLoRA(Fittable):
    """blocklora_A (q, n) and blocklora_B (blocks, m, q), with q = r / blocks for a LoRA of rank r that is split so; the
    sum of the blocks is a LoRA of rank q."""

    family: ClassVar[str] = "blocklora"
    required: ClassVar[frozenset[str]] = frozenset({"blocklora_A", "blocklora_B"})
    scaled: ClassVar[tuple[str, ...]] = ("blocklora_B",)
    Options: ClassVar[type[BlockLoRAOptions]] = BlockLoRAOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "(B_1 + ... + B_k) A"
    count: ClassVar[str] = "r m + r n / k, for a rank of r / k"
    paper: ClassVar[str] = "Block-LoRA 2025, arXiv 2501.16720"
    reconstruction: ClassVar[str] = (
        "the paper's abstract tells the sharing of A; that all blocks share one, and that the scale is that of a LoRA, "
        "are this project's reading, and a fit makes the blocks equal"
    )

    a: Tensor
    b: Tensor
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> BlockLoRA:
        return cls(parameters["blocklora_A"], parameters["blocklora_B"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        a, b = specs["blocklora_A"].shape, specs["blocklora_B"].shape
        fits = len(a) == 2 and len(b) == 3 and a[0] == b[2] and 0 not in a + b
        return None if fits else f"blocklora_A {a} and blocklora_B {b} do not chain"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["blocklora_A"].shape[0]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        shape = (specs["blocklora_B"].shape[1], specs["blocklora_A"].shape[1])
        return layout.shape or (shape[::-1] if layout.transposed else shape)

    def parameters(self) -> dict[str, Tensor]:
        return {"blocklora_A": self.a, "blocklora_B": self.b}

    def operator(self, base: Tensor | None = None) -> Operator:
        return LowRank(self.b.double().sum(0), self.a, self.scale)

    @classmethod
    def encode(cls, source: Source, options: BlockLoRAOptions) -> BlockLoRA:
        rank, delta = options.rank, source.delta
        if options.blocks < 1 or (rank is not None and rank < 1):
            raise UsageError(f"blocklora: rank {rank} and blocks {options.blocks} have to be 1 or more")
        if rank is None:
            if not isinstance(delta, LowRank):
                raise AdapterError("the delta is no product of factors; say of which rank it should become: rank=N")
            rank = delta.rank
        best = truncate(delta, min(rank, *source.shape), seed=source.seed).operator
        assert isinstance(best, LowRank)
        block = best.left * (best.scale / options.blocks)
        b = block.unsqueeze(0).expand(options.blocks, -1, -1)
        return cls(cast_to(best.right, source.stored), cast_to(b, source.stored), 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> BlockLoRAOptions | None:
        m, n = source.shape
        rank = nbytes // ((BlockLoRAOptions.blocks * m + n) * source.stored.itemsize)
        return BlockLoRAOptions(min(rank, m, n)) if rank else None

    @classmethod
    def size(cls, source: Source, options: BlockLoRAOptions) -> int:
        (m, n), rank = source.shape, min(options.rank or source.rank, source.rank)
        return rank * (options.blocks * m + n) * source.stored.itemsize
