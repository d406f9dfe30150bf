"""Bit packing against Python's own arithmetic on whole numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.quant.bits import WIDTHS, pack, packed_size, unpack


@given(st.sampled_from(WIDTHS), st.data())
def test_codes_lie_one_after_the_other_from_the_lowest_bit_on(width: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=70))
    number = sum(code << (i * width) for i, code in enumerate(codes))
    size = -(-len(codes) * width // 8)
    packed = pack(torch.tensor(codes, dtype=torch.uint8), width)
    assert bytes(packed.tolist()) == number.to_bytes(size, "little")
    assert packed.numel() == packed_size(len(codes), width) == size
    assert unpack(packed, width, len(codes)).tolist() == codes


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", [(0,), (1, 1), (3, 5), (1, 17), (2, 0)])
def test_any_shape_is_packed_flat(width: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**width, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(codes, width), width, codes.numel()), codes.flatten())


@pytest.mark.parametrize("width", WIDTHS)
def test_codes_may_begin_at_any_byte(width: int) -> None:
    codes = torch.randint(0, 2**width, (65,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes[1:], width)
    assert torch.equal(packed, pack(codes[1:].clone(), width))
    behind = torch.cat([packed[:1], packed])[1:]
    assert torch.equal(unpack(behind, width, 64), codes[1:])


def test_a_code_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="a code of 4 does not fit 2 bits"):
        pack(torch.tensor([4], dtype=torch.uint8), 2)


def test_bytes_that_are_not_those_of_as_many_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="4 bytes are not those of 9 codes of 2 bits"):
        unpack(torch.zeros(4, dtype=torch.uint8), 2, 9)


def test_only_whole_parts_of_a_byte_and_three_bits_are_widths() -> None:
    with pytest.raises(ValueError, match="codes have 1, 2, 3, 4, 8 bits, not 5"):
        pack(torch.zeros(1, dtype=torch.uint8), 5)
