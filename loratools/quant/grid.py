"""Whole numbers on a grid, row by row, deflated: what a row costs follows from how its numbers spread.

Rows are put into classes by their mean magnitude, so that numbers of one distribution stand together and one Huffman
table fits them all; small ones share bytes, several to a byte, for a Huffman code spends a bit on a byte at least.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 2**14 - 1  # magnitude of a number on the grid
_STEPS = 4  # classes to an octave
_EXACT = 2.0**-20  # of the largest number of a row: how far from whole numbers float32 may have put them
_MULTIPLES = 64
_RAREST = -32  # class of rows with hardly a number that is not zero
_FEW = 4096  # numbers of a stream up to which a table for several to a byte may cost more than it saves


@dataclass(frozen=True)
class Stream:
    """The numbers of one class: `count` of them below `base` once folded, `per_byte` to a byte (0: two bytes each)."""

    base: int
    per_byte: int
    count: int
    nbytes: int  # deflated

    def to_json(self) -> list[int]:
        """As `from_json` takes it."""
        return [self.base, self.per_byte, self.count, self.nbytes]

    @classmethod
    def from_json(cls, fields: Any) -> Stream:
        """ValueError for what is no stream."""
        match fields:
            case [int(base), int(per_byte), int(count), int(nbytes)] if (
                1 <= base <= 2 * LARGEST + 1
                and 0 <= per_byte <= 8
                and (base**per_byte <= 256 if per_byte else True)
                and count >= 0
                and nbytes >= 0
            ):
                return cls(base, per_byte, count, nbytes)
        raise ValueError(f"{fields!r} describes no stream")


def classes_of(codes: Tensor) -> list[int]:
    """The class of each row of (rows, columns) whole numbers."""
    columns = codes.shape[1]
    means = [total / columns for total in codes.abs().sum(1).tolist()] if columns else [0.0] * len(codes)
    return [max(_RAREST, round(_STEPS * math.log2(mean))) if mean > 0 else _RAREST for mean in means]


def compress(numbers: Tensor) -> tuple[Stream, bytes]:
    """A vector of whole numbers within `LARGEST`, deflated in the shorter of a few ways.

    Noise repeats nothing that is worth a search: Huffman codes alone are best, with runs where nearly all is zero.
    """
    x = -numbers.to(torch.int16)
    folded = (x << 1) ^ (x >> 15)
    base = int(folded.max()) + 1 if len(x) else 1
    most = 0 if base > 256 else 8 if base == 1 else max(1, int(math.log(256) / math.log(base) + 1e-9))
    found = []
    for per_byte in sorted({min(most, 1), most}) if len(x) <= _FEW else (most,):
        data = _symbols(folded, base, per_byte)
        for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE):
            squeezer = zlib.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
            found.append((per_byte, squeezer.compress(data) + squeezer.flush()))
    per_byte, best = min(found, key=lambda pair: len(pair[1]))
    return Stream(base, per_byte, len(x), len(best)), best


def _symbols(folded: Tensor, base: int, per_byte: int) -> bytes:
    if per_byte == 0:
        return folded.numpy().astype("<i2").tobytes()
    digits = torch.nn.functional.pad(folded.to(torch.uint8), (0, -len(folded) % per_byte)).reshape(-1, per_byte)
    symbols = digits[:, per_byte - 1].clone()
    for i in reversed(range(per_byte - 1)):
        symbols.mul_(base).add_(digits[:, i])
    return symbols.numpy().tobytes()


def expand(stream: Stream, data: bytes) -> Tensor:
    """The numbers that `compress` took, as int16; ValueError where the data are not theirs."""
    size = 2 * stream.count if stream.per_byte == 0 else -(-stream.count // stream.per_byte)
    stretcher = zlib.decompressobj(-15)
    try:
        raw = stretcher.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"a stream cannot be inflated: {error}") from None
    if len(raw) != size:
        raise ValueError(f"a stream of {stream.count} numbers holds {'more' if len(raw) > size else 'fewer'}")
    if stream.per_byte == 0:
        folded = torch.frombuffer(bytearray(raw), dtype=torch.int16).to(torch.int32) if raw else torch.zeros(0).int()
    else:
        table = _digits(stream.base, stream.per_byte)
        codes = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)
        folded = table[codes.int()].reshape(-1)[: stream.count]
    half = (folded + 1) >> 1
    return torch.where((folded & 1) == 1, half, -half).to(torch.int16)


def _digits(base: int, per_byte: int) -> Tensor:
    """(256, per_byte): the numbers that each byte stands for."""
    codes = torch.arange(256, dtype=torch.int32)
    return torch.stack([(codes // base**i) % base for i in range(per_byte)], dim=1)


@dataclass(frozen=True, eq=False)
class Gridded:
    """A matrix as `scales` times whole numbers: one scale for each row, or one for all."""

    codes: Tensor  # (rows, columns) int16
    scales: Tensor  # (rows,) or (1,), float16 or float32

    def decode(self) -> Tensor:
        """The float32 matrix."""
        return self.codes.float() * self.scales.float().unsqueeze(1)


def unit_of_rows(rows: Tensor) -> Tensor:
    """The numbers (rows,) of which each row of `rows` is whole multiples, float64; 0 for a row of zeros.

    ValueError where a row is no such thing, as seen from float32: within 2^-20 of its largest number.
    """
    x = rows.detach().double()
    size = x.abs()
    top = size.amax(1) if x.shape[1] else x.new_zeros(len(x))
    least = torch.where(size > 0, size, math.inf).amin(1) if x.shape[1] else top
    found = torch.where(top > 0, math.nan, 0.0).to(x)
    for multiple in range(1, _MULTIPLES + 1):  # that the smallest number of a row may be
        if not bool((open_rows := found.isnan()).any()):
            return found
        unit = least[open_rows] / multiple
        codes = x[open_rows] / unit.unsqueeze(1)
        near = (codes - codes.round()).abs().amax(1) <= _EXACT * codes.abs().amax(1)
        fits = near & (codes.abs().amax(1) <= LARGEST + 0.5)
        found[open_rows] = torch.where(fits, unit, math.nan)
    if bool(found.isnan().any()):
        raise ValueError(f"row {int(found.isnan().nonzero()[0])} is no whole multiple of any number")
    return found


def collect(rows: Iterable[tuple[int, Tensor]]) -> dict[int, Tensor]:
    """Rows by class, each class as one vector, in the order in which they come."""
    found: dict[int, list[Tensor]] = {}
    for kind, row in rows:
        found.setdefault(kind, []).append(row)
    return {kind: torch.cat(found[kind]) for kind in sorted(found)}
