"""Ascending places as bytes, near the fewest that tell them: each place's low bits, and its high ones in unary.

Of `count` places below `size` (Elias 1974, Fano 1971) each is split at b bits. The low parts take b bits each; the i-th
high part h is a one at bit h + i of a string of zeros. That is 2 + log2(size / count) bits a place, within half a bit
of what a random choice must take, and known from `count` and `size` alone. Where one bit for every place that there
is takes no more, the string is that.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.families.base import Layout
    from loratools.storage.base import TensorSpec

_WIDEST = 40


def places_nbytes(count: int, size: int) -> int:
    """Bytes of `count` places below `size`."""
    return min(_nbytes(count, size, width) for width in range(_WIDEST))


def places_problem(spec: TensorSpec, count: int, size: int | None) -> str | None:
    """What is wrong with bytes of such a spec for `count` places below `size`, where that is known; or None."""
    if spec.dtype != "U8" or len(spec.shape) != 1 or not spec.numel:
        return f"places of {spec.dtype} {spec.shape} are no bytes"
    if size is not None and (count > size or spec.numel != places_nbytes(count, size)):
        return f"{spec.numel} bytes are not those of {count} places among {size}"
    return None


def entries_problem(slot: str, values: TensorSpec, places: TensorSpec, layout: Layout) -> str | None:
    """What is wrong with a vector `slot` of numbers and the bytes of their places in a weight; or None."""
    if len(values.shape) != 1 or not values.numel or not values.dtype.startswith(("F", "BF")):
        return f"{slot} of {values.dtype} {values.shape} are no vector of real numbers"
    return places_problem(places, values.numel, None if layout.shape is None else math.prod(layout.shape))


def most_entries(nbytes: int, item: int, size: int) -> int:
    """How many numbers of `item` bytes, with their places below `size`, `nbytes` hold; 0 where none fit."""
    return bisect_right(range(1, size + 1), nbytes, key=lambda count: entries_nbytes(count, item, size))


def entries_nbytes(count: int, item: int, size: int) -> int:
    """Bytes of `count` numbers of `item` bytes with their places below `size`."""
    return count * item + places_nbytes(count, size)


def pack_places(places: Tensor, size: int) -> Tensor:
    """Ascending, distinct places below `size` (k,) as a uint8 vector."""
    count, width = len(places), _width(len(places), size)
    places = places.to(torch.int64)
    if not width:
        return packed_bits(torch.zeros(size, dtype=torch.bool).index_fill_(0, places, True))
    low = (places.unsqueeze(1) >> torch.arange(width)) & 1  # (k, width)
    high = torch.zeros(count + ((size - 1) >> width), dtype=torch.bool)
    high[(places >> width) + torch.arange(count)] = True
    return torch.cat([packed_bits(low.reshape(-1).bool()), packed_bits(high)])


def places_of(slot: str, packed: Tensor, count: int, size: int, shape: tuple[int, int]) -> Tensor:
    """As `unpack_places`, for a weight of `shape`; AdapterError names the slot."""
    try:
        return unpack_places(packed, count, size)
    except ValueError as error:
        raise AdapterError(f"{slot} are damaged, or of another shape than {shape}: {error}") from error


def unpack_places(packed: Tensor, count: int, size: int) -> Tensor:
    """The places, (count,) int64; ValueError for bytes that tell no such places."""
    if packed.numel() != places_nbytes(count, size):
        raise ValueError(f"{packed.numel()} bytes are not those of {count} places among {size}")
    width = _width(count, size)
    if not width:
        places = unpacked_bits(packed)[:size].nonzero().flatten()
    else:
        cut = -(-count * width // 8)
        low = unpacked_bits(packed[:cut])[: count * width].reshape(count, width).to(torch.int64)
        high = unpacked_bits(packed[cut:]).nonzero().flatten()
        if len(high) != count:
            raise ValueError(f"they tell {len(high)} places, not {count}")
        places = ((high - torch.arange(count)) << width) + (low << torch.arange(width)).sum(1)
    if len(places) != count or not bool((places[1:] > places[:-1]).all()) or int(places[-1]) >= size:
        raise ValueError(f"they tell no {count} ascending places below {size}")
    return places


def checked_numbers(stored: Tensor, size: int, problem: str) -> Tensor:
    """Stored numbers of lines as int64; AdapterError with `problem` where they are not different ones below `size`."""
    numbers = stored.to(torch.int64)
    inside = bool(((stored == numbers) & (numbers >= 0) & (numbers < size)).all())
    if not inside or len(numbers.unique()) != len(numbers):
        raise AdapterError(problem)
    return numbers


def _width(count: int, size: int) -> int:
    """The low bits of each place; 0 for a bit for every place that there is."""
    return min(range(_WIDEST), key=lambda width: _nbytes(count, size, width))


def _nbytes(count: int, size: int, width: int) -> int:
    if not width:
        return -(-size // 8)
    return -(-count * width // 8) - (-(count + ((size - 1) >> width)) // 8)


def packed_bits(bits: Tensor) -> Tensor:
    """Booleans as bytes, the first in the lowest bit."""
    whole = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).reshape(-1, 8)
    out = whole[:, 0].clone()
    for i in range(1, 8):
        out |= whole[:, i] << i
    return out


def unpacked_bits(packed: Tensor) -> Tensor:
    """The bits of bytes, uint8 zeros and ones."""
    return ((packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1)
