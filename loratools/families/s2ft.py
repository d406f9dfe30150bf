"""S2FT: some rows of the delta, or some columns (Yang et al. 2024), in the order of the base weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.places import checked_numbers
from loratools.linalg.entries import channel_weights, first_largest
from loratools.linalg.lines import columns_of, energies, units
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_PLACE = 4  # bytes of the number of a row or column
_AXES = ("rows", "columns")
_EQUAL = 1e-12  # energies that differ by less, relatively, are one


@dataclass(frozen=True)
class S2FTOptions:
    """`rank` rows or columns, or the `share` of all that there are, or as many as keep this share of `energy`.

    `axis`: rows, columns, or best: whichever of the two loses less, and of equals the one of fewer numbers.
    """

    rank: int | None = None
    share: float = 0.03
    energy: float | None = None
    axis: str = "best"

    def __post_init__(self) -> None:
        if self.axis not in (*_AXES, "best"):
            raise UsageError(f"s2ft: axis is {self.axis!r}; it must be rows, columns or best")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"s2ft: rank is {self.rank}; it must be 1 or more")
        for name in ("share", "energy"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UsageError(f"s2ft: {name} is {value}; it must be above 0 and at most 1")

    def lines(self, squares: Tensor) -> int:
        """How many, of lines with these squared norms."""
        if self.energy is not None:
            kept = squares.sort(descending=True).values.cumsum(0)
            enough = kept >= self.energy * kept[-1] * (1 - _EQUAL)
            return int(enough.nonzero()[0]) + 1
        return min(len(squares), max(1, round(self.share * len(squares))) if self.rank is None else self.rank)


@final
@dataclass(frozen=True, eq=False)
class S2FT(Fittable):
    """s2ft_values (k, n), the rows s2ft_rows (k,) of the delta, or (m, k), the columns s2ft_columns (k,).

    Exactly a LoRA of rank k. The paper trains rows of the modules that write heads and channels and columns of those
    that read them, the same units in both; here each target has those that serve it best.
    """

    family: ClassVar[str] = "s2ft"
    required: ClassVar[frozenset[str]] = frozenset({"s2ft_values"})
    optional: ClassVar[frozenset[str]] = frozenset({"s2ft_rows", "s2ft_columns"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("s2ft_values",)
    Options: ClassVar[type[S2FTOptions]] = S2FTOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "k rows, or k columns, zero elsewhere"
    count: ClassVar[str] = "k n or k m, and k places"
    paper: ClassVar[str] = "Yang et al. 2024, NeurIPS"

    values: Tensor
    places: Tensor
    axis: str
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> S2FT:
        axis = next(axis for axis in _AXES if f"s2ft_{axis}" in parameters)
        return cls(parameters["s2ft_values"], parameters[f"s2ft_{axis}"], axis, scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        values, axes = specs["s2ft_values"], [axis for axis in _AXES if f"s2ft_{axis}" in specs]
        if len(axes) != 1:
            return "it must have either s2ft_rows or s2ft_columns"
        if len(values.shape) != 2 or not values.numel or not values.dtype.startswith(("F", "BF")):
            return f"s2ft_values of {values.dtype} {values.shape} hold no lines of real numbers"
        count, places = values.shape[_AXES.index(axes[0])], specs[f"s2ft_{axes[0]}"].shape
        if places != (count,):
            return f"s2ft_{axes[0]} {places} are not the places of {count} {axes[0]}"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["s2ft_values"].shape["s2ft_columns" in specs]

    def parameters(self) -> dict[str, Tensor]:
        return {"s2ft_values": self.values, f"s2ft_{self.axis}": self.places}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("S2FT", base, self.layout)
        problem = f"of the base weight {(m, n)}; is it the right base?"
        along, across = (m, n) if self.axis == "rows" else (n, m)
        if self.values.shape[1 if self.axis == "rows" else 0] != across:
            raise AdapterError(f"s2ft_values {tuple(self.values.shape)} hold no {self.axis} {problem}")
        which = checked_numbers(self.places, along, f"s2ft_{self.axis} are not different {self.axis} {problem}")
        values, ones = self.values.double(), units(which, along)
        return LowRank(ones, values, self.scale) if self.axis == "rows" else LowRank(values, ones.T, self.scale)

    @classmethod
    def encode(cls, source: Source, options: S2FTOptions) -> S2FT:
        of_rows, of_columns = energies(source.delta, channel_weights(source.squares))
        squares = {"rows": of_rows, "columns": of_columns}
        axis, count = _chosen(squares, options, source.shape)
        which = first_largest(squares[axis], count)
        delta = source.delta if axis == "columns" else source.delta.T
        values = columns_of(delta, which)
        values = values if axis == "columns" else values.T
        return cls(cast_to(values, source.stored), which.to(torch.int32), axis, 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> S2FTOptions | None:
        (m, n), item = source.shape, source.stored.itemsize
        of_rows, of_columns = energies(source.delta, channel_weights(source.squares))
        squares = {"rows": of_rows, "columns": of_columns}
        counts = {"rows": min(m, nbytes // (n * item + _PLACE)), "columns": min(n, nbytes // (m * item + _PLACE))}
        if not any(counts.values()):
            return None
        axis = _better(squares, counts, source.shape)
        return S2FTOptions(rank=counts[axis], axis=axis)

    @classmethod
    def size(cls, source: Source, options: S2FTOptions) -> int:
        """Known from shapes for a rank along one axis, else by the norms of all rows and columns."""
        (m, n), item = source.shape, source.stored.itemsize
        if options.axis == "best" or options.energy is not None:
            squares = dict(zip(_AXES, energies(source.delta, channel_weights(source.squares)), strict=True))
            axis, count = _chosen(squares, options, source.shape)
        else:
            axis = options.axis
            count = options.lines(torch.ones(m if axis == "rows" else n))
        return count * ((n if axis == "rows" else m) * item + _PLACE)


def _chosen(squares: Mapping[str, Tensor], options: S2FTOptions, shape: tuple[int, int]) -> tuple[str, int]:
    """The axis, and how many lines of it."""
    counts = {axis: options.lines(squares[axis]) for axis in _AXES}
    axis = options.axis if options.axis != "best" else _better(squares, counts, shape)
    return axis, counts[axis]


def _better(squares: Mapping[str, Tensor], counts: Mapping[str, int], shape: tuple[int, int]) -> str:
    """The axis whose best lines hold more; of equals the one of fewer numbers."""
    held = {axis: float(squares[axis].sort(descending=True).values[: counts[axis]].sum()) for axis in _AXES}
    numbers = {"rows": counts["rows"] * shape[1], "columns": counts["columns"] * shape[0]}
    if abs(held["rows"] - held["columns"]) <= _EQUAL * max(held.values()):
        return min((axis for axis in _AXES if counts[axis]), key=lambda axis: numbers[axis])
    return max(_AXES, key=lambda axis: held[axis])
