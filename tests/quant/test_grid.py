"""Whole numbers, deflated: round trips and sizes near the entropy."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.quant.grid import LARGEST, Gridded, Stream, classes_of, collect, compress, expand


@given(st.lists(st.integers(-LARGEST, LARGEST), max_size=300))
def test_numbers_come_back(numbers: list[int]) -> None:
    stream, data = compress(torch.tensor(numbers, dtype=torch.int16))
    assert expand(Stream.from_json(stream.to_json()), data).tolist() == numbers
    assert stream.count == len(numbers)
    assert stream.nbytes == len(data)


@given(st.integers(0, 3), st.lists(st.integers(-1, 1), max_size=500))
def test_small_numbers_come_back(spread: int, numbers: list[int]) -> None:
    scaled = [n * spread for n in numbers]
    stream, data = compress(torch.tensor(scaled, dtype=torch.int16))
    assert expand(stream, data).tolist() == scaled


@pytest.mark.parametrize(("deviation", "most"), [(0.2, 1.6), (0.4, 1.12), (1.0, 1.08), (3.0, 1.04), (20.0, 1.02)])
def test_the_size_is_near_the_entropy(deviation: float, most: float) -> None:
    numbers = (torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * deviation).round().to(torch.int16)
    counts = Counter(numbers.tolist())
    entropy = -sum(n / len(numbers) * math.log2(n / len(numbers)) for n in counts.values())
    assert len(compress(numbers)[1]) * 8 < most * entropy * len(numbers)


def test_rows_are_put_into_classes_by_their_mean_magnitude() -> None:
    rows = torch.tensor([[0, 0, 0, 0], [1, -1, 1, 1], [4, -4, 4, -4], [2, 0, -2, 0]], dtype=torch.int16)
    assert classes_of(rows) == [-32, 0, 8, 0]
    together = collect(zip(classes_of(rows), rows, strict=True))
    assert list(together) == [-32, 0, 8]
    assert together[0].tolist() == [1, -1, 1, 1, 2, 0, -2, 0]


def test_a_row_is_a_scale_times_whole_numbers() -> None:
    gridded = Gridded(torch.tensor([[1, -2], [3, 0]], dtype=torch.int16), torch.tensor([0.5, 2.0]))
    assert gridded.decode().tolist() == [[0.5, -1.0], [6.0, 0.0]]
    assert Gridded(gridded.codes, torch.tensor([2.0])).decode().tolist() == [[2.0, -4.0], [6.0, 0.0]]


def test_streams_that_hold_something_else_are_refused() -> None:
    stream, data = compress(torch.arange(-50, 50, dtype=torch.int16))
    with pytest.raises(ValueError, match="cannot be inflated"):
        expand(stream, b"\xff" + data)
    with pytest.raises(ValueError, match="of 99 numbers holds more"):
        expand(Stream(stream.base, stream.per_byte, 99, stream.nbytes), data)
    with pytest.raises(ValueError, match="of 101 numbers holds fewer"):
        expand(Stream(stream.base, stream.per_byte, 101, stream.nbytes), data)


@pytest.mark.parametrize(
    "fields", [None, [1, 2], [0, 1, 1, 1], [300, 1, 5, 5], [2, 9, 5, 5], [2, 1, -1, 5], [2, 1, 5, -5]]
)
def test_what_describes_no_stream_is_refused(fields: object) -> None:
    with pytest.raises(ValueError, match="describes no stream"):
        Stream.from_json(fields)
