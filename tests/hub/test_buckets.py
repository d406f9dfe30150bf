"""Rank buckets against every choice there is."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import UsageError
from loratools.hub.buckets import bucket_of, rank_buckets

VLLM = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def padding(ranks: list[int], weights: list[float], buckets: tuple[int, ...]) -> float:
    """Each rank padded to the least bucket that holds it; infinite where none does."""
    total = 0.0
    for rank, weight in zip(ranks, weights, strict=True):
        held = [bucket for bucket in buckets if bucket >= rank]
        total += weight * (min(held) - rank) if held else float("inf")
    return total


def best(ranks: list[int], weights: list[float], count: int, among: tuple[int, ...]) -> float:
    return min(
        padding(ranks, weights, chosen)
        for size in range(1, min(count, len(among)) + 1)
        for chosen in combinations(among, size)
    )


ADAPTERS = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 100)), min_size=1, max_size=20)


@settings(deadline=None)
@given(ADAPTERS, st.integers(1, 5))
def test_no_choice_of_ranks_wastes_less(adapters: list[tuple[int, float]], count: int) -> None:
    ranks, weights = [r for r, _ in adapters], [w for _, w in adapters]
    chosen = rank_buckets(np.array(ranks), np.array(weights), count)
    assert 1 <= len(chosen) <= count
    assert list(chosen) == sorted(set(chosen))
    # Ranks that nobody has are never better, so that these are all choices worth a look.
    among = tuple(sorted(set(ranks)))
    assert padding(ranks, weights, chosen) == pytest.approx(best(ranks, weights, count, among), rel=1e-9, abs=1e-9)
    assert [chosen[i] for i in bucket_of(np.array(ranks), chosen)] == [min(b for b in chosen if b >= r) for r in ranks]


@settings(deadline=None)
@given(st.lists(st.integers(1, 512), min_size=1, max_size=20), st.integers(1, 9))
def test_no_choice_of_allowed_ranks_wastes_less(ranks: list[int], count: int) -> None:
    weights = [1.0] * len(ranks)
    chosen = rank_buckets(np.array(ranks), np.array(weights), count, allowed=VLLM)
    assert set(chosen) <= set(VLLM)
    assert padding(ranks, weights, chosen) == best(ranks, weights, count, VLLM)


def test_weights_move_the_buckets() -> None:
    ranks = np.array([4, 8, 16, 64])
    assert rank_buckets(ranks, np.array([1.0, 1, 1, 1]), 2) == (16, 64)
    assert rank_buckets(ranks, np.array([100.0, 1, 1, 1]), 2) == (4, 64)


def test_no_more_buckets_than_needed() -> None:
    assert rank_buckets(np.array([8, 8, 16]), np.ones(3), 9) == (8, 16)
    assert rank_buckets(np.array([3, 5, 7]), np.ones(3), 9, allowed=VLLM) == (8,)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        rank_buckets(np.array([8]), np.ones(1), 0)
    with pytest.raises(UsageError, match="600 is above 512"):
        rank_buckets(np.array([8, 600]), np.ones(2), 2, allowed=VLLM)
