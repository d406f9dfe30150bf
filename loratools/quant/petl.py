"""PETL-ViT's quantiser and its records (Jie, Wang and Deng 2023, arXiv 2307.16867), to the byte.

One mean and one deviation to a tensor, the level of a code is the Gaussian median of its cell. The deviation is the
unbiased one, and 1e-5 is added to it on the way in but not on the way out, as the authors' code has it. What is coded
again becomes another tensor: keep the codes of what was read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.quant.bits import pack, packed_size, unpack
from loratools.quant.codebooks import cells

if TYPE_CHECKING:
    from torch import Tensor

BITS: Final = (1, 2, 3, 4)  # widths that have a codebook
FILE_BITS: Final = (1, 2, 4)  # widths whose codes fill bytes as the authors' file has them
_EPSILON: Final = 1e-5
# Upper halves of the symmetric codebooks as the authors' 500 rounds leave them, in float32 not always the fixed point.
_LEVELS: Final = {
    1: (0.674489750196,),
    2: (0.377754161149, 1.26572032502),
    3: (0.202623803071, 0.625419726064, 1.11372893788, 1.79202503505),
    4: (
        0.105550281539, 0.319035996953, 0.54007205887, 0.775192048082, 1.03400627765, 1.33310667895, 1.70773756516,
        2.26549061338,
    ),
}  # fmt: skip
_BOUNDARIES: Final[dict[int, tuple[float, ...]]] = {
    1: (),
    2: (0.821737243086,),
    3: (0.414021764568, 0.869574331971, 1.45287698647),
    4: (0.212293138969, 0.429554027378, 0.657632052726, 0.904599161954, 1.18355647729, 1.52042212103, 1.98661408832),
}
_MOMENTS: Final = struct.Struct("<ff")  # the authors write the machine's own order, which is this one


@dataclass(frozen=True, eq=False)
class PetlCodes:
    """A tensor in codes: uint8 in its shape, with the mean and the deviation of what was coded."""

    bits: int
    codes: Tensor
    mean: float
    deviation: float

    def decode(self) -> Tensor:
        """The float32 tensor that the authors' loader makes of it."""
        return _table(self.bits)[0].to(self.codes.device)[self.codes.long()] * self.deviation + self.mean

    def to_bytes(self) -> bytes:
        """The record of the authors' file: codes, mean, deviation."""
        _check_record(self.codes.numel(), self.bits)
        return pack(self.codes, self.bits).numpy().tobytes() + _MOMENTS.pack(self.mean, self.deviation)


def encode(weight: Tensor, bits: int) -> PetlCodes:
    """`weight` in codes of `bits`, as the authors' `dump` makes them; a number midway takes the lower level.

    A constant tensor decodes to its constant. AdapterError for fewer than two numbers, which have no deviation, for NaN
    and infinity, and for numbers whose deviation float32 cannot hold.
    """
    boundaries = _table(bits)[1]
    flat = weight.detach().float().contiguous()
    if flat.numel() < 2:
        raise AdapterError(
            f"a tensor of shape {tuple(weight.shape)} has no deviation, which the quantiser of PETL-ViT divides by; "
            "leave it as it is"
        )
    if not bool(torch.isfinite(flat).all()):
        raise AdapterError("holds NaN or infinity, which no code stands for")
    mean, deviation = flat.mean(), flat.std()
    if not math.isfinite(float(deviation)):
        raise AdapterError(f"its numbers reach {float(flat.abs().max()):.3g}, beyond what float32 has a deviation for")
    z = (flat - mean) / (deviation + _EPSILON)
    codes = cells(z, boundaries, upper=False)
    return PetlCodes(bits, codes, float(mean), float(deviation))


def fake_quantise(weight: Tensor, bits: int) -> Tensor:
    """`encode` and `decode` in one: the float32 tensor that is left of `weight`, in its shape."""
    return encode(weight, bits).decode()


def record_size(count: int, bits: int) -> int:
    """Bytes of the record of `count` numbers: the codes, the mean and the deviation."""
    _check_record(count, bits)
    return packed_size(count, bits) + _MOMENTS.size


def file_size(counts: Sequence[int], bits: int, *, whole: int = 0) -> int:
    """Bytes of a file of records with these counts, and of `whole` float32 numbers after them."""
    return sum(record_size(count, bits) for count in counts) + 4 * whole


def from_bytes(record: bytes | memoryview, bits: int, shape: tuple[int, ...]) -> PetlCodes:
    """What `PetlCodes.to_bytes` wrote; ValueError where the bytes are not those of such a record."""
    count = math.prod(shape)
    if len(record) != record_size(count, bits):
        raise ValueError(f"{len(record)} bytes are not the record of {count} codes of {bits} bits")
    codes = torch.frombuffer(bytearray(record[: -_MOMENTS.size]), dtype=torch.uint8)
    mean, deviation = _MOMENTS.unpack(record[-_MOMENTS.size :])
    return PetlCodes(bits, unpack(codes, bits, count).reshape(shape), mean, deviation)


@cache
def _table(bits: int) -> tuple[Tensor, Tensor]:
    """The levels, and the boundaries between them."""
    if bits not in BITS:
        raise AdapterError(f"PETL-ViT has codes of {', '.join(map(str, BITS))} bits here, not {bits}")
    upper, above = _LEVELS[bits], _BOUNDARIES[bits]
    levels = (*(-v for v in reversed(upper)), *upper)
    boundaries = (*(-v for v in reversed(above)), 0.0, *above)
    return torch.tensor(levels, dtype=torch.float32), torch.tensor(boundaries, dtype=torch.float32)


def _check_record(count: int, bits: int) -> None:
    if bits not in FILE_BITS:
        raise AdapterError(f"the file of PETL-ViT has codes of {', '.join(map(str, FILE_BITS))} bits, not {bits}")
    if not count or count * bits % 8:
        raise AdapterError(
            f"{count} codes of {bits} bits fill no whole bytes, and the file of PETL-ViT would lose the rest; "
            "write it with loratools quantize --method petl"
        )
