"""Codes of a few bits in bytes, exactly: element i takes the bits from i * width on, least significant first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (1, 2, 3, 4, 8)
# Codes in one word of memory, each in a byte of it, are brought together by shifts of halves, quarters and so on: the
# word, and the shifts with what they leave, from codes side by side to codes in bytes of their own.
_WORDS = {
    1: ("int64", ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
    2: ("int32", ((12, 0x000F000F), (6, 0x03030303))),
    3: ("int64", ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707))),
    4: ("int16", ((4, 0x0F0F),)),
}


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` codes of `width` bits: the last byte is filled with zeros."""
    return -(-count * width // 8)


def pack(codes: Tensor, width: int) -> Tensor:
    """The codes, flattened, as `packed_size` bytes, a uint8 vector; ValueError for one that needs more bits."""
    _check(width)
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) >> width:
        raise ValueError(f"a code of {int(flat.max())} does not fit {width} bits")
    flat = flat.to(torch.uint8).contiguous()
    if width == 8:
        return flat
    dtype, steps = _WORDS[width]
    flat = _padded(flat, getattr(torch, dtype).itemsize)
    if flat.storage_offset() % 8:  # no word begins there
        flat = flat.clone()
    word = flat.view(getattr(torch, dtype))
    for (shift, _), mask in zip(reversed(steps), [*(m for _, m in reversed(steps[:-1])), -1], strict=True):
        word = (word | (word >> shift)) & mask
    if width == 3:
        word = word.view(torch.uint8).reshape(-1, 8)[:, :3].reshape(-1)
    return word.to(torch.uint8)[: packed_size(codes.numel(), width)].contiguous()


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` codes as a uint8 vector; ValueError where the bytes do not hold as many."""
    _check(width)
    if packed.numel() != packed_size(count, width):
        raise ValueError(f"{packed.numel()} bytes are not those of {count} codes of {width} bits")
    if width == 8:
        return packed.clone()
    dtype, steps = _WORDS[width]
    if width == 3:
        wide = packed.new_zeros(-(-packed.numel() // 3), 8)
        wide[:, :3] = _padded(packed, 3).reshape(-1, 3)
        word = wide.view(torch.int64).reshape(-1)
    else:
        word = packed.to(getattr(torch, dtype))
    for shift, mask in steps:
        word = (word | (word << shift)) & mask
    return word.view(torch.uint8)[:count]


def _padded(flat: Tensor, multiple: int) -> Tensor:
    rest = -flat.numel() % multiple
    return torch.nn.functional.pad(flat, (0, rest)) if rest else flat


def _check(width: int) -> None:
    if width not in WIDTHS:
        raise ValueError(f"codes have {', '.join(map(str, WIDTHS))} bits, not {width}")
