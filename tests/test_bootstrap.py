"""Intervals by rows drawn again, against the normal approximation and cases whose interval is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loratools.bootstrap import Sampled, bootstrap


def test_bootstrap_draws_rows_again() -> None:
    values = np.random.default_rng(6).normal(size=400)
    drawn = bootstrap(lambda rows: {"mean": float(values[rows].mean())}, 400, resamples=2000, seed=1)["mean"]
    assert drawn.value == values.mean()
    low, high = drawn.interval
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    again = bootstrap(lambda rows: {"mean": float(values[rows].mean())}, 400, resamples=2000, seed=1)["mean"]
    assert np.array_equal(drawn.draws, again.draws)
    other = bootstrap(lambda rows: {"mean": float(values[rows].mean())}, 400, resamples=2000, seed=2)["mean"]
    assert not np.array_equal(drawn.draws, other.draws)


def test_differences_are_of_pairs() -> None:
    """Of two measures that go up and down together the difference is far surer than either."""
    values = np.random.default_rng(8).normal(size=300)
    a, b = (
        bootstrap(lambda rows, by=by: {"mean": float((values[rows] + by).mean())}, 300, resamples=500, seed=3)["mean"]  # type: ignore[misc]
        for by in (0.0, 0.25)
    )
    assert (b - a).interval == pytest.approx((0.25, 0.25))
    assert (b - a).value == pytest.approx(0.25)


def test_draws_without_a_value_are_left_out_of_an_interval() -> None:
    drawn = Sampled(math.nan, np.array([math.nan, 1.0, 1.0]))
    assert drawn.interval == (1.0, 1.0)
    assert all(math.isnan(end) for end in Sampled(math.nan, np.array([math.nan])).interval)
