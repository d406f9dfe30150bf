"""What lies where in a pack: the sizes of everything are known before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

from loratools._lazy import torch
from loratools.quant.codec import Coding, Fit, encode, from_bytes
from loratools.storage.base import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["joint", "cluster", "diag", "sparse", "atoms"]  # of the bases that a target shares
METHODS: Final[tuple[str, ...]] = get_args(Method)
PIECE: Final = 1 << 20  # bytes of a piece before the next begins
NORM: Final = 4  # bytes of a delta's norm, F32
_INDEX: Final = 2  # bytes of the place of a coefficient, U16
_GROUP: Final = 128  # numbers of a row in codes that share a scale
_LARGEST: Final = 1 << 20  # of a side, a width, a number of anything in the index of a pack


@dataclass(frozen=True)
class Numbers:
    """How matrices are stored: in a dtype, or in codes of `bits` bits with scales."""

    dtype: str = "F32"
    bits: int = 0

    @property
    def coding(self) -> Coding | None:
        """None for numbers that are stored as they are."""
        if not self.bits:
            return None
        # scales in F32: they always hold what they must, so that sizes do not depend on the numbers
        if self.bits == 8:
            return Coding(8, "uniform", _GROUP, offset=True, stored="F32")
        return Coding(self.bits, "lloyd", _GROUP, stored="F32")

    def plain(self) -> Numbers:
        """The same without codes, for vectors that are too short for scales."""
        return Numbers(self.dtype)

    def size(self, rows: int, columns: int) -> int:
        """Bytes of a (rows, columns) matrix."""
        coding = self.coding
        return rows * columns * DTYPES[self.dtype][1] // 8 if coding is None else coding.size(rows, columns)

    def encode(self, matrix: Tensor) -> Tensor:
        """The bytes of a matrix, a uint8 vector of `size`."""
        coding = self.coding
        if coding is None:
            stored = matrix.to(getattr(torch, DTYPES[self.dtype][0])).contiguous()
            return stored.reshape(-1).view(torch.uint8)
        fit: Fit = "range" if coding.offset else "squares"
        return encode(matrix.float(), coding, fit).to_bytes()

    def decode(self, data: Tensor, rows: int, columns: int) -> Tensor:
        """The float64 matrix; ValueError where the bytes are not those of such a matrix."""
        if data.numel() != self.size(rows, columns):
            raise ValueError(f"{data.numel()} bytes are no {rows} x {columns} matrix")
        coding = self.coding
        if coding is None:
            numbers = data.clone().view(getattr(torch, DTYPES[self.dtype][0]))
            return numbers.reshape(rows, columns).double()
        return from_bytes(data, coding, rows, columns).decode().double()

    def rounded(self, matrix: Tensor) -> Tensor:
        """The float64 matrix that its bytes decode to."""
        return self.decode(self.encode(matrix), *matrix.shape)


@dataclass(frozen=True)
class Shared:
    """The bases of one target: `groups` pairs of them, `width` vectors to a side, and `count` atoms of each pair."""

    method: Method
    width: int
    groups: int = 1
    count: int = 0

    def parts(self, shape: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The shapes of the matrices of one pair: left vectors as rows, right ones, atoms."""
        atoms = ((self.count, self.width**2),) if self.count else ()
        return ((self.width, shape[0]), (self.width, shape[1]), *atoms)

    def base_size(self, shape: tuple[int, int], numbers: Numbers) -> int:
        """Bytes of one pair."""
        return sum(numbers.size(*part) for part in self.parts(shape))

    @property
    def most_factors(self) -> int:
        """The largest rank of a core at which its factors are smaller than all of it; 0 where no core is stored."""
        return (self.width - 1) // 2 if self.method in ("joint", "cluster") else 0

    @property
    def most_kept(self) -> int:
        """The largest `Part.kept` that means something."""
        return self.width if self.method in ("joint", "cluster", "sparse") else 0

    def core_size(self, numbers: Numbers, kept: int = 0) -> int:
        """Bytes of what an adapter stores of one target, with `kept` as in `Part`."""
        match self.method:
            case "joint" | "cluster":
                return 2 * numbers.size(kept, self.width) if kept else numbers.size(self.width, self.width)
            case "diag":
                return numbers.plain().size(1, self.width)
            case "atoms":
                return numbers.plain().size(1, self.count)
            case "sparse":
                return kept * _INDEX + numbers.plain().size(1, kept)


@dataclass(frozen=True)
class Part:
    """What one adapter has of one target: the pair of bases that it uses or -1, components of its own, coefficients.

    `kept` is the number of these where they are sparse, and the rank of a core that is stored as its factors; 0 for
    one that is stored whole.
    """

    group: int = -1
    rank: int = 0
    kept: int = 0

    def size(self, shape: tuple[int, int], shared: Shared | None, numbers: Numbers) -> int:
        """Bytes, its norm included."""
        core = shared.core_size(numbers, self.kept) if shared is not None and self.group >= 0 else 0
        return NORM + core + self.rank_size(shape, numbers)

    def rank_size(self, shape: tuple[int, int], numbers: Numbers) -> int:
        """Bytes of the components of its own."""
        return sum(numbers.size(self.rank, side) for side in shape) if self.rank else 0

    def width(self, shared: Shared | None) -> int:
        """Components of the delta as it is unpacked; one of zeros where there are none."""
        inside = 0
        if shared is not None and self.group >= 0:
            inside = self.kept if self.kept or shared.method == "sparse" else shared.width
        return max(1, inside + self.rank)


@dataclass(frozen=True)
class PackTarget:
    """One target of a pack: the name and shape that its adapters agree on, and what they share."""

    name: str
    shape: tuple[int, int]
    shared: Shared | None = None

    def to_json(self) -> list[Any]:
        """As `from_json` takes it."""
        shared = [] if self.shared is None else list(vars(self.shared).values())
        return [self.name, *self.shape, *shared]

    @classmethod
    def from_json(cls, fields: Any) -> PackTarget:
        """ValueError for what is no target."""
        match fields:
            case [str(name), int(m), int(n)]:
                shared = None
            case [str(name), int(m), int(n), str(method), int(width), int(groups), int(count)] if method in METHODS:
                shared = Shared(cast("Method", method), width, groups, count)
            case _:
                raise ValueError(f"{fields!r:.80} describes no target")
        numbers = (m, n, *(() if shared is None else (shared.width, shared.groups, shared.count + 1)))
        if not all(1 <= x <= _LARGEST for x in numbers):
            raise ValueError(f"{fields!r:.80} describes no target")
        return cls(name, (m, n), shared)


def places(sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(piece, first byte in it) of each of several things that are stored one after the other, none of them divided."""
    piece = at = 0
    for size in sizes:
        if at and at + size > PIECE:
            piece, at = piece + 1, 0
        yield piece, at
        at += size


def piece_sizes(sizes: Sequence[int]) -> list[int]:
    """The bytes of each piece."""
    found: dict[int, int] = {}
    for size, (piece, at) in zip(sizes, places(sizes), strict=True):
        found[piece] = at + size
    return list(found.values())


def share_of(shape: tuple[int, int]) -> str:
    """The file of the bases of targets of a shape."""
    return f"bases/{shape[0]}x{shape[1]}.safetensors"
