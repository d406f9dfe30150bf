"""What a family promises: named parameters that lower to an operator, and can be refitted from one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from loratools._lazy import torch
from loratools.errors import AdapterError, NeedsBaseError
from loratools.operators import BlockDiagonal
from loratools.storage.header import spec_of

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from loratools.operators import Operator
    from loratools.storage.base import TensorSpec


@dataclass(frozen=True)
class Layout:
    """How the (m, n) operator of an update lies in the base parameter; read off the dialect, never guessed.

    `transposed`: the base stores the transpose (Conv1D, embeddings). `experts`: the base parameter is a stack of that
    many matrices, and the factors interleave them. `embedding`: the target is an embedding table. `magnitude_axis`: the
    axis of the operator that a DoRA magnitude runs along, 0 for outputs and 1 for input channels. `blocks`: the rows of
    consecutive projections that the parameter fuses, and whether each of them is updated; empty where all rows are one.
    `shape`: that of the base parameter, where the dialect states it.
    """

    transposed: bool = False
    experts: int = 1
    embedding: bool = False
    magnitude_axis: int = 0
    blocks: tuple[tuple[int, bool], ...] = ()
    shape: tuple[int, ...] | None = None

    @property
    def sides(self) -> tuple[int, int]:
        """(m, n) of the operator, from the stated shape; ValueError where there is none."""
        if self.shape is None:
            raise ValueError("the dialect states no shape")
        return _sides(self.shape, transposed=self.transposed)


def _sides(shape: tuple[int, ...], *, transposed: bool) -> tuple[int, int]:
    outputs, inputs = (shape[0] if shape else 1), math.prod(shape[1:])
    return (inputs, outputs) if transposed else (outputs, inputs)


Settings = Mapping[str, Any]
NO_SETTINGS: Settings = MappingProxyType({})


class Update(ABC):
    """One target's parameters in one family; immutable.

    A final subclass lists its slots, keeps its tensors in the shapes in which they are stored, and checks them when
    made: AdapterError where they do not fit together. `references` are slots whose tensors several targets share;
    settings are the numbers that a method keeps in its config rather than in tensors. `scaled` are the slots that take
    what a change of scale leaves over: the delta is linear in those of them that there are, together; none where a
    scale cannot be changed. `needs_shape_alone`: of the base no more is needed than its shape, which some dialects
    state.
    """

    family: ClassVar[str]
    required: ClassVar[frozenset[str]]
    optional: ClassVar[frozenset[str]] = frozenset()
    references: ClassVar[frozenset[str]] = frozenset()
    needs_base: ClassVar[bool] = False
    needs_shape_alone: ClassVar[bool] = False
    scaled: ClassVar[tuple[str, ...]] = ()
    scale: float
    layout: Layout

    @classmethod
    @abstractmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> Self:
        """Build from stored tensors by slot, shared ones included."""

    @classmethod
    def redrawn(cls, settings: Settings) -> frozenset[str]:
        """The shared tensors that a file may lack, for these settings say how they were drawn at random."""
        return frozenset()

    @classmethod
    @abstractmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        """What is wrong with these shapes, or None; needs no tensor data."""

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        """The rank as the dialects count it; 0 for a family without one."""
        return 0

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...] | None:
        """Shape of the base parameter that the delta is added to; None where the file does not tell."""
        return layout.shape

    @classmethod
    def awaits_base(cls, layout: Layout) -> bool:
        """Whether the delta cannot be had without the base weight."""
        return cls.needs_base and not (cls.needs_shape_alone and layout.shape is not None)

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """Stored tensors by slot, without those that targets share."""

    def shared_tensors(self) -> dict[str, Tensor]:
        """The tensors by slot that targets share and a file has to hold; those drawn from a seed are not among them."""
        return {}

    def stated_settings(self) -> dict[str, Any]:
        """What `from_parameters` takes for settings, as JSON has it."""
        return {}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same update with other numbers in some slots, in the shapes and of the kind that were there."""
        held = self.parameters()
        return cast("Self", _exchanged(self, {id(held[slot]): tensor for slot, tensor in tensors.items()}))

    @abstractmethod
    def operator(self, base: Tensor | None = None) -> Operator:
        """The delta, scale included, as (m, n) maps; `base` in the base's own layout.

        Raises NeedsBaseError where the family needs the base and has none.
        """

    def bias_delta(self, bias: Tensor | None = None) -> Tensor | None:
        """The float32 change of the base bias, where the family makes one; `bias` is the base's own."""
        return None

    def magnitude_gains(self, base: Tensor | None = None) -> Tensor | None:
        """The float64 factors that a magnitude puts on the outputs, or on the inputs; None for a family without one.

        Raises NeedsBaseError where they depend on the base and there is none.
        """
        return None

    def delta(self, base: Tensor | None = None) -> Tensor:
        """The dense float32 change of the base parameter, in the base's layout."""
        op = self.operator(base).to(torch.float64)
        shape = None if base is None else tuple(base.shape)
        if shape is None:
            shape = self.base_shape({slot: spec_of(t) for slot, t in self.parameters().items()}, self.layout)
        if shape is None:
            raise NeedsBaseError("nothing states the shape of the base parameter")
        parts = op.blocks if isinstance(op, BlockDiagonal) else (op,)
        if sum(math.prod(part.shape) for part in parts) != math.prod(shape):
            raise AdapterError(
                f"its delta is {op.shape[0]} x {op.shape[1]}, and its base parameter is said to be {shape}"
            )
        if isinstance(op, BlockDiagonal):
            stacked = torch.stack([b.dense() for b in op.blocks])
            stacked = stacked.mT if self.layout.experts > 1 and self.layout.transposed else stacked
            return stacked.reshape(shape).float().contiguous()
        dense = op.dense()
        return (dense.T if self.layout.transposed else dense).reshape(shape).float().contiguous()


class LowRankUpdate(Update):
    """A family with ranks that can be lowered: it has a low-rank part, and can be refitted from one."""

    @classmethod
    @abstractmethod
    def rank_step(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        """Ranks are multiples of this: the groups of a grouped convolution, 1 elsewhere."""

    @classmethod
    @abstractmethod
    def bytes_per_rank(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        """Bytes that each rank of a fitted update takes in the stored dtypes."""

    @abstractmethod
    def low_rank_part(self, base: Tensor | None = None) -> Operator:
        """The part of the delta that a squeeze approximates: all of it, for a plain low-rank family."""

    @abstractmethod
    def direction_operator(self) -> Operator:
        """The low-rank map known without the base, scale included: the delta, unless a magnitude rescales it."""

    @abstractmethod
    def fit(self, part: Operator, *, scale: float, base: Tensor | None = None) -> Self:
        """The update of this family whose low-rank part is `part` (low rank, or blocks of it), written with `scale`.

        Tensors are cast to the stored dtypes. Raises AdapterError where the family cannot hold it.
        """

    @abstractmethod
    def with_direction(self, part: Operator, *, scale: float) -> Self:
        """This update with `part` for its `direction_operator`, in float32, and everything else as it is."""

    @abstractmethod
    def minus(self, other: Self) -> Self:
        """self - other, of one scale, exactly, with the ranks added; AdapterError where that is not possible."""

    @abstractmethod
    def prefix(self, rank: int, *, delta_scale: float, scale: float) -> Self:
        """The first `rank` components as trained, times `delta_scale`, written with `scale`.

        Raises AdapterError where the family has no components to slice.
        """


def _exchanged(value: Any, by_identity: Mapping[int, Tensor]) -> Any:
    """`value` with the tensors that it is made of exchanged for others."""
    if isinstance(value, Update):
        held = {f.name: _exchanged(getattr(value, f.name), by_identity) for f in fields(cast("Any", value))}
        return replace(cast("Any", value), **held)
    if isinstance(value, Mapping):
        return {key: _exchanged(item, by_identity) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_exchanged(item, by_identity) for item in value)
    return by_identity.get(id(value), value)


def base_matrix(family: str, base: Tensor | None, layout: Layout) -> Tensor:
    """The base weight as (m, n) float64; NeedsBaseError where there is none."""
    if base is None:
        raise NeedsBaseError(f"the delta of {family} depends on the base weight")
    matrix = base.T if layout.transposed else base.flatten(1) if base.ndim > 1 else base.unsqueeze(1)
    return matrix.double()


def base_size(family: str, base: Tensor | None, layout: Layout) -> tuple[int, int]:
    """(m, n) of the base weight, for a delta that its shape alone decides; NeedsBaseError where nobody states it."""
    if base is not None:
        return _sides(tuple(base.shape), transposed=layout.transposed)
    if layout.shape is None:
        raise NeedsBaseError(f"the delta of {family} depends on the base weight, for its shape")
    return layout.sides
