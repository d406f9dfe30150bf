"""Codes of a few bits in bytes, exactly: element i takes the bits from i * width on, least significant first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (1, 2, 3, 4, 8)


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` codes of `width` bits: the last byte is filled with zeros."""
    return -(-count * width // 8)


def pack(codes: Tensor, width: int) -> Tensor:
    """The codes, flattened, as `packed_size` bytes, a uint8 vector; ValueError for one that needs more bits."""
    _check(width)
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) >> width:
        raise ValueError(f"a code of {int(flat.max())} does not fit {width} bits")
    flat = flat.to(torch.uint8)
    if width == 8:
        return flat.contiguous()
    group = 8 // width if width != 3 else 8  # codes that fill whole bytes
    if rest := -flat.numel() % group:
        flat = torch.nn.functional.pad(flat, (0, rest))
    columns = flat.reshape(-1, group)
    if width == 3:
        out = _three_bytes(columns.T.to(torch.int32))
    else:
        out = columns[:, 0].clone()
        for i in range(1, group):
            out |= columns[:, i] << (i * width)
    return out[: packed_size(codes.numel(), width)].contiguous()


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` codes as a uint8 vector; ValueError where the bytes do not hold as many."""
    _check(width)
    if packed.numel() != packed_size(count, width):
        raise ValueError(f"{packed.numel()} bytes are not those of {count} codes of {width} bits")
    if width == 8:
        return packed.clone()
    if width == 3:
        return _of_three_bytes(packed)[:count]
    mask, group = (1 << width) - 1, 8 // width
    columns = packed.new_empty(packed.numel(), group)
    for i in range(group):
        torch.bitwise_and(packed >> (i * width), mask, out=columns[:, i])
    return columns.reshape(-1)[:count]


def _three_bytes(columns: Tensor) -> Tensor:
    """Eight codes (8, k) of three bits as three bytes (3 k,)."""
    word = columns[0].clone()
    for i in range(1, 8):
        word |= columns[i] << (3 * i)
    return torch.stack([word & 255, (word >> 8) & 255, (word >> 16) & 255], dim=1).to(torch.uint8).reshape(-1)


def _of_three_bytes(packed: Tensor) -> Tensor:
    if rest := -packed.numel() % 3:
        packed = torch.nn.functional.pad(packed, (0, rest))
    three = packed.reshape(-1, 3).to(torch.int32)
    word = three[:, 0] | (three[:, 1] << 8) | (three[:, 2] << 16)
    return torch.stack([(word >> (3 * i)) & 7 for i in range(8)], dim=1).to(torch.uint8).reshape(-1)


def _check(width: int) -> None:
    if width not in WIDTHS:
        raise ValueError(f"codes have {', '.join(map(str, WIDTHS))} bits, not {width}")
