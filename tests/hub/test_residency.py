"""Who stays in memory against every choice, and simulated requests against formulas and a slow cache."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.hub.popularity import drawn, zipf
from loratools.hub.residency import lru_estimate, lru_hits, most_popular, static_hits

ITEMS = st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=10)
NONE = np.empty(0, np.int64)


@settings(deadline=None)
@given(ITEMS, st.integers(1, 60))
def test_the_greedy_choice_is_within_one_item_of_the_best(items: list[tuple[int, float]], capacity: int) -> None:
    sizes, worth = np.array([s for s, _ in items]), np.array([w for _, w in items])
    best = max(
        sum(w for w, yes in zip(worth, chosen, strict=True) if yes)
        for chosen in product([False, True], repeat=len(items))
        if sum(s for s, yes in zip(sizes, chosen, strict=True) if yes) <= capacity
    )
    if worth.sum() > 0:
        worth, best = worth / worth.sum(), best / worth.sum()
    kept, bound = most_popular(worth, sizes, capacity)
    assert sizes[kept].sum() <= capacity
    got = worth[kept].sum()
    assert best / 2 - 1e-12 <= got <= best + 1e-12
    assert best <= bound + 1e-12
    left = [w for w, yes in zip(worth, kept, strict=True) if not yes]
    assert got >= bound - max(left, default=0.0) - 1e-12
    # Nothing that still fits is left out.
    assert all(kept | (sizes > capacity - sizes[kept].sum()))


def test_equal_sizes_keep_the_most_popular_ones() -> None:
    kept, bound = most_popular(np.array([0.1, 0.4, 0.2, 0.3]), np.full(4, 5), 12)
    assert kept.tolist() == [False, True, False, True]
    assert bound == pytest.approx(0.7 + 0.2 * 2 / 5)


def naive_lru(trace: list[int], sizes: list[int], pools: list[int], capacities: list[int], first: list[int]):  # type: ignore[no-untyped-def]
    """Lists, from the oldest to the newest, counted again at every step."""
    there: list[list[int]] = [[i for i in first if pools[i] == pool] for pool in range(len(capacities))]
    hits = evictions = loaded = 0
    for item in trace:
        cache = there[pools[item]]
        if item in cache:
            hits += 1
            cache.remove(item)
            cache.append(item)
            continue
        loaded += sizes[item]
        if sizes[item] > capacities[pools[item]]:
            continue
        while sum(sizes[i] for i in cache) + sizes[item] > capacities[pools[item]]:
            cache.pop(0)
            evictions += 1
        cache.append(item)
    return hits, evictions, loaded


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_lru_is_that_of_a_slow_cache(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 12))
    sizes, pools = rng.integers(1, 6, count), rng.integers(0, 2, count)
    capacities = rng.integers(1, 12, 2)
    first = [i for i in range(count) if sizes[i] <= capacities[pools[i]]]
    first = [min((i for i in first if pools[i] == p), default=-1) for p in (0, 1)]
    first = [i for i in first if i >= 0]
    trace = rng.integers(0, count, 200)
    found = lru_hits(trace, sizes, pools, capacities, np.array(first, np.int64))
    expected = naive_lru(trace.tolist(), sizes.tolist(), pools.tolist(), capacities.tolist(), first)
    assert (found.hits, found.evictions, found.loaded) == expected


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0, 1.4])
def test_a_trace_hits_what_is_expected(exponent: float) -> None:
    count, requests = 500, 200_000
    shares = zipf(count, exponent, 3).weights
    shares = shares / shares.sum()
    sizes = np.random.default_rng(0).choice([16, 32, 64], count)
    kept, _ = most_popular(shares, sizes, 3200)
    trace = drawn(shares, requests, 0)
    expected = shares[kept].sum()
    deviation = math.sqrt(expected * (1 - expected) / requests)
    static = static_hits(trace, sizes, kept)
    assert abs(static.hit_rate - expected) < 4.5 * deviation
    assert static.loaded == sum(int(sizes[i]) for i in trace if not kept[i])
    # Che's approximation is good to a per cent or so at this size; the trace is long against the cache.
    pools, capacities = np.zeros(count, np.int64), np.array([3200])
    lru = lru_hits(trace, sizes, pools, capacities, NONE)
    assert abs(lru.hit_rate - lru_estimate(shares, sizes, pools, capacities)) < 0.01


def test_the_estimate_solves_the_equation_of_che() -> None:
    shares = np.array([0.5, 0.3, 0.2])
    sizes = np.array([2, 3, 4])
    zero, capacity = np.zeros(3, np.int64), np.array([6])
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        taken = sum(s * (1 - math.exp(-p * middle)) for s, p in zip(sizes, shares, strict=True))
        low, high = (middle, high) if taken < 6 else (low, middle)
    expected = sum(p * (1 - math.exp(-p * low)) for p in shares)
    assert lru_estimate(shares, sizes, zero, capacity) == pytest.approx(expected, rel=1e-9)
    assert lru_estimate(shares, sizes, zero, np.array([9])) == pytest.approx(1.0)


def test_pools_do_not_share() -> None:
    trace = np.array([0, 1, 0, 1, 2, 0])
    sizes, pools, capacities = np.array([2, 2, 2]), np.array([0, 1, 0]), np.array([2, 2])
    found = lru_hits(trace, sizes, pools, capacities, NONE)
    assert (found.hits, found.evictions, found.loaded) == (2, 2, 8)


def test_traces_are_the_same_for_the_same_seed() -> None:
    shares = np.array([0.0, 0.25, 0.75, 0.0])
    assert drawn(shares, 1000, 5).tolist() == drawn(shares, 1000, 5).tolist() != drawn(shares, 1000, 6).tolist()
    assert set(drawn(shares, 1000, 5).tolist()) == {1, 2}
