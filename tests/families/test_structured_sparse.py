"""N:M and block sparsity: what is kept is the best there is, and bytes are those of the formula."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from loratools.errors import AdapterError, UsageError
from loratools.families import NM, BlockSparse
from loratools.families.base import Layout
from loratools.families.block_sparse import BlockSparseOptions
from loratools.families.fitting import Source
from loratools.families.nm import NMOptions
from loratools.families.places import places_nbytes
from loratools.linalg import entries
from loratools.operators import Dense, LowRank


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(matrix: torch.Tensor, dtype: torch.dtype = torch.float64) -> Source:
    return Source(Dense(matrix), Layout(shape=tuple(matrix.shape)), dtype=dtype)


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (3, 4), (3, 8), (1, 2), (5, 12)])
@pytest.mark.parametrize("weighted", [False, True])
def test_each_group_keeps_its_best_choice(keep: int, group: int, weighted: bool) -> None:
    """Every choice of places is tried."""
    matrix = rand(0, 5, 24)
    weights = rand(1, 24).abs() + 0.1 if weighted else torch.ones(24)
    wanted = np.zeros((5, 24))
    for row in range(5):
        for start in range(0, 24, group):
            part = matrix[row, start : start + group].numpy()
            sizes = (part * weights[start : start + group].numpy()) ** 2
            best = max(combinations(range(group), keep), key=lambda chosen, sizes=sizes: sizes[list(chosen)].sum())
            wanted[row, [start + i for i in best]] = part[list(best)]
    given = replace(source(matrix), squares=weights.square() if weighted else None)
    made = NM.encode(given, NMOptions(keep, group))
    np.testing.assert_array_equal(made.operator().dense().numpy(), wanted)
    bits = math.ceil(math.log2(math.comb(group, keep)))
    assert made.values.numel() == 5 * 24 * keep // group
    assert made.patterns.nbytes == math.ceil(5 * 24 // group * bits / 8)


def test_two_of_four_in_bfloat16_is_eleven_sixteenths_of_a_half() -> None:
    """2:4 of 16 bits: 2 numbers and 3 bits for every 4, so 35 bits of 64."""
    made = NM.encode(source(rand(0, 64, 64), torch.bfloat16), NMOptions())
    assert sum(t.nbytes for t in made.parameters().values()) == 64 * 64 // 4 * 35 // 8


def test_a_budget_chooses_the_densest_groups() -> None:
    given = source(rand(0, 16, 32), torch.float32)
    for limit in (200, 700, 1100, 1900):
        options = NM.within(given, limit)
        assert isinstance(options, NMOptions)
        used = sum(t.nbytes for t in NM.encode(given, options).parameters().values())
        assert used <= limit
        for keep, group in ((k, g) for g in (4, 8, 16) for k in range(1, g)):
            other = NM.encode(given, NMOptions(keep, group))
            fits = sum(t.nbytes for t in other.parameters().values()) <= limit
            assert not fits or (keep / group, group) <= (options.keep / options.group, options.group)
    assert NM.within(source(rand(0, 16, 30)), 10_000) is None


@pytest.mark.parametrize(("side", "count"), [(1, 30), (2, 9), (4, 5), (4, 36)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_blocks_that_hold_most_are_kept(
    side: int, count: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries.row_blocks, "__kwdefaults__", {"multiple": 1, "most": 100})
    delta = LowRank(rand(0, 24, 2), rand(1, 2, 24), -0.5)
    matrix, weights = delta.dense().numpy(), rand(2, 24).abs() + 0.1 if weighted else torch.ones(24)
    across = 24 // side
    sizes = {
        (i, j): float(((matrix * weights.numpy())[i * side : (i + 1) * side, j * side : (j + 1) * side] ** 2).sum())
        for i in range(across)
        for j in range(across)
    }
    wanted = np.zeros((24, 24))
    for i, j in sorted(sizes, key=lambda at: -sizes[at])[:count]:
        part = np.s_[i * side : (i + 1) * side, j * side : (j + 1) * side]
        wanted[part] = matrix[part]
    squares = weights.square() if weighted else None
    given = Source(delta, Layout(shape=(24, 24)), dtype=torch.float64, squares=squares)
    made = BlockSparse.encode(given, BlockSparseOptions(count=count, side=side))
    np.testing.assert_allclose(made.operator().dense().numpy(), wanted, rtol=1e-12)
    assert [t.nbytes for t in made.parameters().values()] == [
        count * side**2 * 8, places_nbytes(count, across**2)
    ]  # fmt: skip


def test_planted_blocks_are_found_again() -> None:
    planted = torch.zeros(32, 48, dtype=torch.float64)
    planted[0:16, 16:32] = rand(0, 16, 16)
    planted[16:32, 32:48] = rand(1, 16, 16)
    noisy = planted + 1e-3 * rand(2, 32, 48)
    made = BlockSparse.encode(source(noisy), BlockSparseOptions(count=2)).operator().dense()
    assert torch.equal(made != 0, planted != 0)
    exact = BlockSparse.encode(source(planted), BlockSparseOptions(share=1 / 3)).operator().dense()
    assert torch.equal(exact, planted)


def test_a_budget_takes_the_widest_blocks_that_fit() -> None:
    given = source(rand(0, 32, 48), torch.float32)
    for limit, side in ((1500, 16), (1000, 8), (100, 4), (30, 2), (7, 1)):
        options = BlockSparse.within(given, limit)
        assert isinstance(options, BlockSparseOptions)
        assert options.side == side
        assert sum(t.nbytes for t in BlockSparse.encode(given, options).parameters().values()) <= limit


def test_shapes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(AdapterError, match="30 inputs are no groups of 4"):
        NM.encode(source(rand(0, 4, 30)), NMOptions())
    with pytest.raises(AdapterError, match="blocks of side 8 do not fill"):
        BlockSparse.encode(source(rand(0, 16, 12)), BlockSparseOptions(side=8))
    for wrong in ((0, 4), (4, 4), (2, 17)):
        with pytest.raises(UsageError, match="are to be kept"):
            NMOptions(*wrong)
    for field in ("count", "side"):
        with pytest.raises(UsageError, match=f"{field} is 0"):
            BlockSparseOptions(**{field: 0})
    with pytest.raises(UsageError, match="share is 0"):
        BlockSparseOptions(share=0)


def test_other_bases_and_damage_are_refused() -> None:
    nm = NM.encode(source(rand(0, 6, 8)), NMOptions(2, 4))
    blocks = BlockSparse.encode(source(rand(0, 8, 8)), BlockSparseOptions(count=3, side=2))
    for update, shape, problem in (
        (nm, (5, 8), "no groups of"),
        (nm, (6, 9), "no groups of"),
        (nm, (6, 4), "no groups of"),
        (blocks, (8, 9), "do not fill"),
        (blocks, (8, 64), "damaged, or of another shape"),
        (replace(nm, patterns=nm.patterns[:-1]), (6, 8), "are not the patterns of 12 groups"),
        (replace(nm, patterns=nm.patterns | 255), (6, 8), "not as many choices"),
    ):
        with pytest.raises(AdapterError, match=problem):
            replace(update, layout=Layout(shape=shape)).operator()
