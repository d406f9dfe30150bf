"""The area under a rank-accuracy curve, against its formula and closed cases."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.errors import UsageError
from loratools.ops.aurac import aurac

Axis = Literal["log2", "linear"]
axes = st.sampled_from(["log2", "linear"])
curves = st.dictionaries(st.integers(1, 512), st.floats(0, 100), min_size=1, max_size=9)


@given(curves, axes)
def test_is_the_trapezoid_rule(curve: dict[int, float], axis: Axis) -> None:
    ranks = sorted(curve)
    if len(ranks) == 1:
        expected = curve[ranks[0]]
    else:
        x = {r: math.log2(r) if axis == "log2" else r for r in ranks}
        area = 0.0
        for low, high in itertools.pairwise(ranks):
            area += (x[high] - x[low]) * (curve[low] + curve[high]) / 2
        expected = area / (x[ranks[-1]] - x[ranks[0]])
    assert aurac(list(curve), list(curve.values()), axis) == pytest.approx(expected, abs=1e-9)


@given(curves, axes)
def test_lies_between_the_worst_and_the_best_score(curve: dict[int, float], axis: Axis) -> None:
    area = aurac(list(curve), list(curve.values()), axis)
    assert min(curve.values()) - 1e-9 <= area <= max(curve.values()) + 1e-9


@given(st.randoms(use_true_random=False), curves, axes)
def test_order_of_the_points_is_free(rng: object, curve: dict[int, float], axis: Axis) -> None:
    points = list(curve.items())
    rng.shuffle(points)  # type: ignore[attr-defined]
    assert aurac([r for r, _ in points], [s for _, s in points], axis) == aurac(list(curve), list(curve.values()), axis)


def test_doubling_ranks_weigh_the_ends_by_half() -> None:
    assert aurac([1, 2, 4, 8], [10, 20, 30, 60]) == pytest.approx((5 + 20 + 30 + 30) / 3)


def test_linear_axis_is_dominated_by_large_ranks() -> None:
    assert aurac([1, 2, 256], [0, 0, 100], "linear") == pytest.approx(254 * 50 / 255)


def test_one_point_is_its_own_score() -> None:
    assert aurac([16], [42.5]) == 42.5


@pytest.mark.parametrize(
    ("ranks", "scores", "match"),
    [
        ([], [], "at least one"),
        ([1, 2], [1.0], "2 ranks but 1 scores"),
        ([0, 2], [1.0, 2.0], "positive"),
        ([-1, 2], [1.0, 2.0], "positive"),
        ([4, 2, 4], [1.0, 2.0, 3.0], "rank 4 is given twice"),
        ([1, 2], [1.0, math.nan], "NaN"),
    ],
)
def test_impossible_curves_are_refused(ranks: list[int], scores: list[float], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        aurac(ranks, scores)


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(UsageError, match="log10"):
        aurac([1, 2], [1.0, 2.0], "log10")  # type: ignore[arg-type]
