"""Block sparsity: the b x b blocks of the delta that hold most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.places import entries_nbytes, most_entries, pack_places, places_of, places_problem
from loratools.linalg.entries import channel_weights, entries_at, first_largest, row_blocks
from loratools.operators import Operator, Sparse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_SIDES = (16, 8, 4, 2, 1)  # of blocks, where none is given: the first that divides both sides of the matrix


@dataclass(frozen=True)
class BlockSparseOptions:
    """`count` blocks, or the `share` of all that there are; `side` of each, by default the first of 16, 8, 4, 2
    and 1 that divides both sides of the matrix."""

    count: int | None = None
    share: float = 0.02
    side: int | None = None

    def __post_init__(self) -> None:
        for name in ("count", "side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"blocksparse: {name} is {value}; it must be 1 or more")
        if not 0 < self.share <= 1:
            raise UsageError(f"blocksparse: share is {self.share}; it must be above 0 and at most 1")

    def blocks(self, total: int) -> int:
        """How many of so many."""
        return max(1, round(self.share * total)) if self.count is None else min(self.count, total)


@final
@dataclass(frozen=True, eq=False)
class BlockSparse(Fittable):
    """blocksparse_values (k, b, b), at the places in the matrix of all blocks, row by row, that blocksparse_places
    tells: bytes as in `loratools.families.places`. How large the weight is the shape states.
    """

    family: ClassVar[str] = "blocksparse"
    required: ClassVar[frozenset[str]] = frozenset({"blocksparse_values", "blocksparse_places"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("blocksparse_values",)
    Options: ClassVar[type[BlockSparseOptions]] = BlockSparseOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "b x b blocks, zero elsewhere"
    count: ClassVar[str] = "k b^2, and k places of about 2 + log2(m n / k b^2) bits"
    paper: ClassVar[str] = "Gray, Radford and Kingma 2017, GPU kernels for block-sparse weights"

    values: Tensor
    places: Tensor
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> BlockSparse:
        return cls(parameters["blocksparse_values"], parameters["blocksparse_places"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        values, places = specs["blocksparse_values"], specs["blocksparse_places"]
        if len(values.shape) != 3 or not values.numel or not values.dtype.startswith(("F", "BF")):
            return f"blocksparse_values of {values.dtype} {values.shape} are no blocks of real numbers"
        if values.shape[1] != values.shape[2]:
            return f"its blocks of {values.shape[1:]} are no squares"
        return places_problem(places, values.shape[0], None)

    def parameters(self) -> dict[str, Tensor]:
        return {"blocksparse_values": self.values, "blocksparse_places": self.places}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("a block-sparse update", base, self.layout)
        count, side, _ = self.values.shape
        if m % side or n % side:
            raise AdapterError(f"blocks of side {side} do not fill a weight of {(m, n)}; is it the right base?")
        blocks = places_of("blocksparse_places", self.places, count, m * n // side**2, (m, n))
        return Sparse(_entries(blocks, side, n), self.values.reshape(-1).double() * self.scale, (m, n))

    @classmethod
    def encode(cls, source: Source, options: BlockSparseOptions) -> BlockSparse:
        m, n = source.shape
        side = _sides(m, n)[0] if options.side is None else options.side
        if m % side or n % side:
            raise AdapterError(f"blocks of side {side} do not fill a weight of {(m, n)}; choose another: --set side=N")
        total = m * n // side**2
        count = options.blocks(total)
        weights = channel_weights(source.squares)
        energies = []
        for _, rows in row_blocks(source.delta, multiple=side):
            counted = rows if weights is None else rows * weights
            energies.append(counted.square().reshape(-1, side, n // side, side).sum((1, 3)).reshape(-1))
        blocks = first_largest(torch.cat(energies), count)
        values = entries_at(source.delta, _entries(blocks, side, n)).reshape(-1, side, side)
        return cls(cast_to(values, source.stored), pack_places(blocks, total), 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> BlockSparseOptions | None:
        (m, n), item = source.shape, source.stored.itemsize
        for side in _sides(m, n):
            total, each = m * n // side**2, side**2 * item
            if fits := most_entries(nbytes, each, total):
                return BlockSparseOptions(count=fits, side=side)
        return None

    @classmethod
    def size(cls, source: Source, options: BlockSparseOptions) -> int:
        (m, n), side = source.shape, options.side or _sides(*source.shape)[0]
        total = m * n // side**2
        return entries_nbytes(options.blocks(total), side**2 * source.stored.itemsize, total)


def _sides(m: int, n: int) -> list[int]:
    return [side for side in _SIDES if m % side == 0 and n % side == 0]


def _entries(blocks: Tensor, side: int, n: int) -> Tensor:
    """Flat places of the entries of these blocks, (k * side * side,), block by block."""
    inside = torch.arange(side)
    rows = (blocks // (n // side) * side)[:, None, None] + inside[:, None]
    columns = (blocks % (n // side) * side)[:, None, None] + inside
    return (rows * n + columns).reshape(-1)
