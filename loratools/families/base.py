"""What a family promises: named parameters that lower to an operator, and can be refitted from one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from typing_extensions import Self

    from loratools.operators import Operator
    from loratools.storage.base import TensorSpec


@dataclass(frozen=True)
class Layout:
    """How the (m, n) operator of an update lies in the base parameter; read off the dialect, never guessed.

    `transposed`: the base stores the transpose (Conv1D, embeddings). `experts`: the base parameter is a stack of that
    many matrices, and the factors interleave them. `embedding`: the target is an embedding table. `magnitude_axis`: the
    axis of the operator that a DoRA magnitude runs along, 0 for outputs and 1 for input channels.
    """

    transposed: bool = False
    experts: int = 1
    embedding: bool = False
    magnitude_axis: int = 0


class Update(ABC):
    """One target's parameters in one family; immutable.

    A final subclass lists its slots, keeps its tensors in the shapes in which they are stored, and checks them when
    made: AdapterError where they do not fit together.
    """

    family: ClassVar[str]
    required: ClassVar[frozenset[str]]
    optional: ClassVar[frozenset[str]]
    needs_base: ClassVar[bool] = False
    scale: float
    layout: Layout

    @classmethod
    @abstractmethod
    def from_parameters(cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout) -> Self:
        """Build from stored tensors by slot."""

    @classmethod
    @abstractmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        """What is wrong with these shapes, or None; needs no tensor data."""

    @classmethod
    @abstractmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        """The rank as the dialects count it."""

    @classmethod
    @abstractmethod
    def rank_step(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        """Ranks are multiples of this: the groups of a grouped convolution, 1 elsewhere."""

    @classmethod
    @abstractmethod
    def bytes_per_rank(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        """Bytes that each rank of a fitted update takes in the stored dtypes."""

    @classmethod
    @abstractmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        """Shape of the base parameter that the delta is added to."""

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """Stored tensors by slot."""

    @abstractmethod
    def operator(self, base: Tensor | None = None) -> Operator:
        """The delta, scale included, as (m, n) maps; `base` in the base's own layout.

        Raises NeedsBaseError where the family needs the base and has none.
        """

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
    def minus(self, other: Self) -> Self:
        """self - other, of one scale, exactly, with the ranks added; AdapterError where that is not possible."""

    @abstractmethod
    def prefix(self, rank: int, *, delta_scale: float, scale: float) -> Self:
        """The first `rank` components as trained, times `delta_scale`, written with `scale`.

        Raises AdapterError where the family has no components to slice.
        """

    @abstractmethod
    def delta(self, base: Tensor | None = None) -> Tensor:
        """The dense float32 change of the base parameter, in the base's layout."""

    @abstractmethod
    def bias_delta(self) -> Tensor | None:
        """The float32 change of the base bias, where the family carries one."""
