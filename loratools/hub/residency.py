"""Which adapters stay in memory, and how often a request finds its own there."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Counts:
    """What a trace of requests came to: a miss is a load, `loaded` the sizes of all, and may evict others."""

    requests: int
    hits: int
    evictions: int
    loaded: int

    @property
    def hit_rate(self) -> float:
        """The share of requests whose adapter was there."""
        return self.hits / self.requests if self.requests else 0.0


def most_popular(
    popularity: NDArray[np.float64], sizes: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.bool_], float]:
    """Which items to keep, and the fractional optimum, which no choice exceeds.

    Greedily by popularity for each unit of size, where those that no longer fit are passed over for smaller ones; or so
    beside the most popular item that fits, where that is better. What is kept is worth at least half of the best
    choice, and at least the fractional optimum less the popularity of the first item that was passed over. Ties go to
    the first.
    """
    order = np.lexsort((sizes, -popularity / sizes))
    kept = _filled(order, sizes, capacity)
    bound = _bound(order, popularity, sizes, capacity)
    single = int(np.argmax(np.where(sizes <= capacity, popularity, -1.0)))
    if not kept[single] and sizes[single] <= capacity:
        beside = _filled(order[order != single], sizes, capacity - int(sizes[single]))
        beside[single] = True
        if popularity[beside].sum() > popularity[kept].sum():
            kept = beside
    return kept, bound


def _filled(order: NDArray[np.int64], sizes: NDArray[np.int64], left: int) -> NDArray[np.bool_]:
    kept = np.zeros(len(sizes), bool)
    while len(order):
        ends = np.cumsum(sizes[order])
        fits = int(np.searchsorted(ends, left, side="right"))
        kept[order[:fits]] = True
        left -= int(ends[fits - 1]) if fits else 0
        rest = order[fits:]
        order = rest[sizes[rest] <= left]  # at least the size that did not fit is gone: as many rounds as sizes
    return kept


def _bound(order: NDArray[np.int64], popularity: NDArray[np.float64], sizes: NDArray[np.int64], capacity: int) -> float:
    """The worth of a knapsack that takes parts of items."""
    ends = np.cumsum(sizes[order])
    fits = int(np.searchsorted(ends, capacity, side="right"))
    whole = float(popularity[order[:fits]].sum())
    if fits < len(order):
        left = capacity - (int(ends[fits - 1]) if fits else 0)
        whole += float(popularity[order[fits]]) * left / int(sizes[order[fits]])
    return min(1.0, whole)


def static_hits(trace: NDArray[np.int64], sizes: NDArray[np.int64], kept: NDArray[np.bool_]) -> Counts:
    """With the same items kept throughout: what is not among them comes for its request and goes again."""
    there = kept[trace]
    return Counts(len(trace), int(there.sum()), 0, int(sizes[trace][~there].sum()))


def lru_hits(
    trace: NDArray[np.int64],
    sizes: NDArray[np.int64],
    pools: NDArray[np.int64],
    capacities: NDArray[np.int64],
    first: NDArray[np.int64],
) -> Counts:
    """With the least recently used evicted, in pools of their own; `first` lie there at the start, the oldest first.

    An item that its pool cannot hold is never kept.
    """
    caches: list[OrderedDict[int, int]] = [OrderedDict() for _ in capacities]
    free = [int(c) for c in capacities]
    for item in first.tolist():
        pool = int(pools[item])
        caches[pool][item] = int(sizes[item])
        free[pool] -= int(sizes[item])
    hits = evictions = loaded = 0
    asked = zip(trace.tolist(), sizes[trace].tolist(), pools[trace].tolist(), strict=True)
    for item, size, pool in asked:
        cache = caches[pool]
        if item in cache:
            cache.move_to_end(item)
            hits += 1
            continue
        loaded += size
        if size <= capacities[pool]:
            while free[pool] < size:
                _, gone = cache.popitem(last=False)
                free[pool] += gone
                evictions += 1
            cache[item] = size
            free[pool] -= size
    return Counts(len(trace), hits, evictions, loaded)


def lru_estimate(
    popularity: NDArray[np.float64],
    sizes: NDArray[np.int64],
    pools: NDArray[np.int64],
    capacities: NDArray[np.int64],
) -> float:
    """The hit rate of `lru_hits` in the long run, for independent requests, by Che's approximation."""
    return sum(
        _che(popularity[chosen], sizes[chosen].astype(np.float64), float(capacity))
        for pool, capacity in enumerate(capacities)
        if (chosen := (pools == pool) & (popularity > 0) & (sizes <= capacity)).any()
    )


def _che(p: NDArray[np.float64], sizes: NDArray[np.float64], capacity: float) -> float:
    """The time T with sum of size * (1 - exp(-p T)) = capacity, by bisection, and the share of hits at it."""
    if sizes.sum() <= capacity:
        return float(p.sum())
    low, high = 0.0, 1.0 / float(p.max())
    while -(sizes * np.expm1(-p * high)).sum() < capacity:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        if -(sizes * np.expm1(-p * middle)).sum() < capacity:
            low = middle
        else:
            high = middle
    return float(-(p * np.expm1(-p * high)).sum())
