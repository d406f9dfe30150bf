"""Entries by size: planted ones are found again, weights count, and bytes are those of the formula."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from loratools.errors import AdapterError, UsageError
from loratools.families import SHiRA, SparseEntries
from loratools.families.base import Layout
from loratools.families.fitting import Fittable, Source
from loratools.families.places import pack_places, places_nbytes, unpack_places
from loratools.families.shira import SHiRAOptions
from loratools.families.sparse import SparseOptions
from loratools.linalg.inner import relative_error
from loratools.operators import Dense, LowRank

both = pytest.mark.parametrize("family", [SHiRA, SparseEntries])


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(matrix: torch.Tensor, dtype: torch.dtype = torch.float32) -> Source:
    return Source(Dense(matrix), Layout(shape=tuple(matrix.shape)), dtype=dtype)


@both
@pytest.mark.parametrize(("shape", "count"), [((40, 30), 25), ((7, 90), 300), ((64, 64), 1), ((9, 9), 81)])
def test_planted_entries_are_found_again(family: type[Fittable], shape: tuple[int, int], count: int) -> None:
    places = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(0))[:count]
    planted = torch.zeros(math.prod(shape), dtype=torch.float64)
    planted[places] = rand(1, count) + 3
    given = source(planted.reshape(shape))
    update = family.encode(given, family.Options(count=count))
    assert relative_error(given.delta, update.operator()) < 1e-6
    noisy = replace(given, delta=Dense(given.delta.dense() + 1e-3 * rand(2, *shape)))
    found = family.encode(noisy, family.Options(count=count)).operator().dense()
    assert sorted(places.tolist()) == found.flatten().nonzero().flatten().tolist()


@both
def test_of_factors_the_largest_products_are_kept(family: type[Fittable]) -> None:
    delta = LowRank(rand(0, 30, 2), rand(1, 2, 20), -0.7)
    matrix = -0.7 * delta.left.numpy() @ delta.right.numpy()
    smallest = np.sort(np.abs(matrix), axis=None)[-60]
    wanted = np.where(np.abs(matrix) >= smallest, matrix, 0)
    made = family.encode(Source(delta, Layout(shape=(30, 20)), dtype=torch.float64), family.Options(share=0.1))
    np.testing.assert_allclose(made.operator().dense().numpy(), wanted, rtol=1e-12)


@both
def test_the_inputs_weigh(family: type[Fittable]) -> None:
    """An input of a hundred times the square counts as ten times the entry."""
    matrix = torch.tensor([[5.0, 1.0, 0.4], [-4.0, 0.9, 0.7]])
    squares = torch.tensor([1.0, 100.0, 1.0])
    made = family.encode(replace(source(matrix), squares=squares), family.Options(count=2)).operator().dense()
    assert made.tolist() == [[0.0, 1.0, 0.0], [0.0, pytest.approx(0.9), 0.0]]


@pytest.mark.parametrize("size", [1, 8, 1000, 4096])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.2, 0.5, 1.0])
def test_places_come_back(size: int, share: float) -> None:
    count = max(1, round(share * size))
    places = torch.randperm(size, generator=torch.Generator().manual_seed(1))[:count].sort().values
    packed = pack_places(places, size)
    assert packed.dtype == torch.uint8
    assert len(packed) == places_nbytes(count, size)
    assert torch.equal(unpack_places(packed, count, size), places)


@pytest.mark.parametrize("count", [1, 50, 500, 5000, 50_000])
def test_places_take_near_the_fewest_bits(count: int) -> None:
    """log2 of the number of choices is the least; a fifth more, and two bytes for their ends, are enough."""
    size = 100_000
    least = (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)
    assert least / 8 <= places_nbytes(count, size) <= 1.2 * least / 8 + 2


def test_damaged_places_are_refused() -> None:
    packed = pack_places(torch.tensor([3, 70, 900]), 1000)
    for broken, problem in (
        (packed[:-1], "are not those of 3 places"),
        (torch.zeros_like(packed), "0 places, not 3"),
        (packed | 255, "places, not 3"),
    ):
        with pytest.raises(ValueError, match=problem):
            unpack_places(broken, 3, 1000)
    with pytest.raises(ValueError, match="no 5 ascending places"):
        unpack_places(torch.tensor([255], dtype=torch.uint8), 5, 8)
    update = SparseEntries(torch.ones(3), torch.zeros_like(packed), 1.0, Layout(shape=(10, 100)))
    with pytest.raises(AdapterError, match="damaged, or of another shape"):
        update.operator()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_formula(dtype: torch.dtype) -> None:
    given = source(rand(0, 60, 50), dtype)
    for limit in (100, 777, 2500):
        options = SparseEntries.within(given, limit)
        assert isinstance(options, SparseOptions)
        assert options.count is not None
        update = SparseEntries.encode(given, options)
        sizes = [t.nbytes for t in update.parameters().values()]
        assert sizes == [options.count * dtype.itemsize, places_nbytes(options.count, 3000)]
        more = options.count + 1
        assert sum(sizes) <= limit < more * dtype.itemsize + places_nbytes(more, 3000)
    options = SHiRA.within(given, 2500)
    assert options == SHiRAOptions(rank=2500 // ((dtype.itemsize + 8) * 110))
    assert sum(t.nbytes for t in SHiRA.encode(given, options).parameters().values()) == (
        options.rank * 110 * (dtype.itemsize + 8)
    )


def test_counts_and_shares() -> None:
    assert SparseOptions().entries(100, 50) == 100
    assert SparseOptions(share=1e-9).entries(100, 50) == 1
    assert SparseOptions(count=9999).entries(10, 5) == 50
    assert SHiRAOptions(rank=2).entries(10, 50) == 120
    assert SHiRAOptions(rank=99).entries(10, 50) == 500
    for wrong in ({"count": 0}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(UsageError, match="it must be"):
            SparseOptions(**wrong)
    with pytest.raises(UsageError, match="rank is 0"):
        SHiRAOptions(rank=0)
