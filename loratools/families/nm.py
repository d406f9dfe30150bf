"""N:M sparsity: the largest N of every M entries in a row, as sparse tensor cores take them (Mishra et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.places import packed_bits, unpacked_bits
from loratools.linalg.entries import channel_weights, row_blocks
from loratools.operators import Operator, Sparse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_LARGEST = 16  # group, of which there are up to 12 870 patterns
_GROUPS = (4, 8, 16)  # among which a budget chooses


@dataclass(frozen=True)
class NMOptions:
    """`keep` entries of every `group` in a row."""

    keep: int = 2
    group: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.group <= _LARGEST:
            raise UsageError(
                f"nm: {self.keep} of {self.group} are to be kept; a group has up to {_LARGEST} entries, and some but "
                "not all of them are kept"
            )


@final
@dataclass(frozen=True, eq=False)
class NM(Fittable):
    """nm_values (m, n / M, N), those of each group in turn; nm_patterns, bytes: for each group the number of its places
    among all choices of N out of M, in the order of `itertools.combinations`, ceil(log2) bits each. The shape tells M.
    """

    family: ClassVar[str] = "nm"
    required: ClassVar[frozenset[str]] = frozenset({"nm_values", "nm_patterns"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("nm_values",)
    Options: ClassVar[type[NMOptions]] = NMOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "N values of every M in a row, zero elsewhere"
    count: ClassVar[str] = "m n N / M, and ceil(log2(M choose N)) bits for every M"
    paper: ClassVar[str] = "Mishra et al. 2021, arXiv 2104.08378"

    values: Tensor
    patterns: Tensor
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> NM:
        return cls(parameters["nm_values"], parameters["nm_patterns"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        values, patterns = specs["nm_values"], specs["nm_patterns"]
        if len(values.shape) != 3 or not values.numel or not values.dtype.startswith(("F", "BF")):
            return f"nm_values of {values.dtype} {values.shape} are no groups of real numbers"
        if len(patterns.shape) != 1 or patterns.dtype != "U8" or not patterns.numel:
            return f"nm_patterns of {patterns.dtype} {patterns.shape} are no bytes"
        return None

    def parameters(self) -> dict[str, Tensor]:
        return {"nm_values": self.values, "nm_patterns": self.patterns}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("an N:M sparse update", base, self.layout)
        rows, groups, keep = self.values.shape
        group = n // groups
        if rows != m or n % groups or not keep < group <= _LARGEST:
            raise AdapterError(f"nm_values {tuple(self.values.shape)} are no groups of {(m, n)}; is it the right base?")
        width = _bits(keep, group)
        bits = unpacked_bits(self.patterns)
        if len(self.patterns) != -(-rows * groups * width // 8):
            raise AdapterError(f"{len(self.patterns)} bytes are not the patterns of {rows * groups} groups")
        codes = (bits[: rows * groups * width].reshape(-1, width).int() << torch.arange(width)).sum(1)
        choices = _choices(keep, group)
        if int(codes.max()) >= len(choices):
            raise AdapterError("nm_patterns are damaged: there are not as many choices")
        places = choices[codes] + torch.arange(rows * groups).unsqueeze(1) * group  # (groups of all rows, keep)
        return Sparse(places.reshape(-1), self.values.reshape(-1).double() * self.scale, (m, n))

    @classmethod
    def encode(cls, source: Source, options: NMOptions) -> NM:
        n, keep, group = source.shape[1], options.keep, options.group
        if n % group:
            raise AdapterError(f"{n} inputs are no groups of {group}; choose another: --set group=N")
        weights = channel_weights(source.squares)
        number = _numbers(keep, group)
        values, codes = [], []
        for _, rows in row_blocks(source.delta):
            grouped = rows.reshape(len(rows), -1, group)
            sizes = grouped.abs() if weights is None else grouped.abs() * weights.reshape(-1, group)
            kept = sizes.sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(dim=-1).values
            values.append(cast_to(grouped.gather(-1, kept), source.stored))
            codes.append(number[(1 << kept).sum(-1)].reshape(-1))
        bits = (torch.cat(codes).unsqueeze(1) >> torch.arange(_bits(keep, group), dtype=torch.int16)) & 1
        return cls(torch.cat(values), packed_bits(bits.reshape(-1)), 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> NMOptions | None:
        (m, n), item = source.shape, source.stored.itemsize

        fits = [
            (keep / group, group, keep)
            for group in _GROUPS
            for keep in range(1, group)
            if n % group == 0 and _nbytes(m * n // group, keep, group, item) <= nbytes
        ]
        return NMOptions(max(fits)[2], max(fits)[1]) if fits else None

    @classmethod
    def size(cls, source: Source, options: NMOptions) -> int:
        groups = math.prod(source.shape) // options.group
        return _nbytes(groups, options.keep, options.group, source.stored.itemsize)


def _nbytes(groups: int, keep: int, group: int, item: int) -> int:
    return groups * keep * item - (-groups * _bits(keep, group) // 8)


def _bits(keep: int, group: int) -> int:
    """Of the number of a choice."""
    return (math.comb(group, keep) - 1).bit_length()


@lru_cache(maxsize=8)
def _choices(keep: int, group: int) -> Tensor:
    """Every choice of places, (choices, keep), in the order of `itertools.combinations`."""
    return torch.tensor(list(combinations(range(group), keep)))


@lru_cache(maxsize=8)
def _numbers(keep: int, group: int) -> Tensor:
    """The number of the choice whose places are the ones of an integer's bits, int16 of 2^group."""
    numbers = torch.zeros(1 << group, dtype=torch.int16)
    choices = _choices(keep, group)
    numbers[(1 << choices).sum(1)] = torch.arange(len(choices), dtype=torch.int16)
    return numbers
