"""Whole numbers, deflated: round trips and sizes near the entropy."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.quant.grid import LARGEST, Gridded, Stream, classes_of, collect, compress, expand, unit_of_rows


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


@given(st.lists(st.lists(st.integers(-40, 40), min_size=7, max_size=7), min_size=1, max_size=5), st.integers(0, 99))
def test_rows_on_a_grid_tell_their_units(numbers: list[list[int]], seed: int) -> None:
    codes = torch.tensor(numbers, dtype=torch.float32)
    scales = torch.rand(len(codes), generator=torch.Generator().manual_seed(seed)) + 0.01
    rows = codes * scales.unsqueeze(1)
    units = unit_of_rows(rows)
    for row, scale, unit in zip(numbers, scales.tolist(), units.tolist(), strict=True):
        wanted = math.gcd(*row) * scale  # the largest number of which all are multiples
        assert math.isclose(unit, wanted, rel_tol=1e-6, abs_tol=0)
    found = (rows.double() / units.where(units > 0, 1.0).unsqueeze(1)).round() * units.unsqueeze(1)
    torch.testing.assert_close(found.float(), rows, rtol=1e-6, atol=0)


def test_rows_on_no_grid_are_named() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows[0] = rows[0].sign() * 0.3
    with pytest.raises(ValueError, match="row 1 is no whole multiple"):
        unit_of_rows(rows)
    with pytest.raises(ValueError, match="row 0 is no whole multiple"):
        unit_of_rows((rows[:1] * torch.arange(50)).bfloat16())
    with pytest.raises(ValueError, match="row 0 is no whole multiple"):
        unit_of_rows(torch.tensor([[1.0, LARGEST + 1.0]]))
    assert unit_of_rows(torch.zeros(2, 0)).tolist() == [0, 0]


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
