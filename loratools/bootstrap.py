"""How far a measure of some rows may be off: intervals from rows drawn again with replacement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Measure = Callable[[NDArray[np.int64]], Mapping[str, float]]

_SHARE = 0.95  # of the draws inside an interval


@dataclass(frozen=True, eq=False)
class Sampled:
    """A value, and what it was on each draw of the rows."""

    value: float
    draws: NDArray[np.float64]

    def __sub__(self, other: Sampled) -> Sampled:
        """The difference of two that were drawn with the same seed: row by row in pairs."""
        return Sampled(self.value - other.value, self.draws - other.draws)

    @property
    def interval(self) -> tuple[float, float]:
        """The middle 95 % of the draws; NaN where no draw has a value."""
        known = self.draws[np.isfinite(self.draws)]
        if not len(known):
            return math.nan, math.nan
        low, high = np.quantile(known, [(1 - _SHARE) / 2, (1 + _SHARE) / 2])
        return float(low), float(high)


def bootstrap(measure: Measure, n: int, *, resamples: int, seed: int) -> dict[str, Sampled]:
    """What `measure` says of rows 0 to n - 1, and of `resamples` draws of n of them.

    The draws depend on n and `seed` alone, so that two calls are in pairs.
    """
    rng = np.random.default_rng(seed)
    whole = measure(np.arange(n))
    draws: dict[str, list[float]] = {name: [] for name in whole}
    for _ in range(resamples):
        found = measure(rng.integers(0, n, n))
        for name in whole:
            draws[name].append(found[name])
    return {name: Sampled(value, np.array(draws[name], dtype=np.float64)) for name, value in whole.items()}
