"""Calibration errors, against loops over single predictions and cases whose value is known."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from loratools.calibration import (
    ace_class,
    ace_top,
    binned,
    brier,
    classwise_ece,
    ece,
    fit_temperature,
    log_probabilities,
    mce,
    measures_of_choices,
    measures_of_confidence,
    nll,
    scaled,
    tace,
    top_label,
)
from loratools.errors import UsageError


def example(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels that are neither calibrated nor hopeless."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n, classes)) * 2
    truth = np.exp(log_probabilities(scores, 2.0))
    labels = np.array([rng.choice(classes, p=row) for row in truth])
    return np.exp(log_probabilities(scores)), labels


def calibrated(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), size=n)
    return p, np.array([rng.choice(classes, p=row) for row in p])


def bin_of(value: float, bins: int) -> int:
    """(l, u], the first closed at 0, by comparing with each edge."""
    for b in range(bins):
        if value <= (b + 1) / bins:
            return b
    raise AssertionError(value)


def naive_binned(values: list[float], hits: list[float], bins: int) -> list[tuple[int, float, float]]:
    groups: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for value, hit in zip(values, hits, strict=True):
        groups[bin_of(value, bins)].append((value, hit))
    return [(len(g), math.fsum(v for v, _ in g) / len(g), math.fsum(h for _, h in g) / len(g)) for g in groups if g]


def naive_adaptive(values: list[float], hits: list[float], bins: int) -> list[tuple[int, float]]:
    """(size, |gap|) of floor(n / bins) at a time, the rest in the last; for values without ties."""
    pairs = sorted(zip(values, hits, strict=True))
    bins = min(bins, len(pairs))
    size = len(pairs) // bins
    cuts = [pairs[b * size : (b + 1) * size] for b in range(bins - 1)] + [pairs[(bins - 1) * size :]]
    return [(len(c), abs(math.fsum(h for _, h in c) - math.fsum(v for v, _ in c)) / len(c)) for c in cuts]


CASES = [(1, 2, 5), (7, 3, 10), (100, 4, 15), (333, 5, 10), (64, 2, 1)]


@pytest.mark.parametrize(("n", "classes", "bins"), CASES)
def test_every_measure_is_that_of_a_loop(n: int, classes: int, bins: int) -> None:
    p, labels = example(n, classes)
    best = [max(range(classes), key=lambda c: row[c]) for row in p]
    sure = [float(row[c]) for row, c in zip(p, best, strict=True)]
    right = [float(c == y) for c, y in zip(best, labels, strict=True)]
    confidences, correct = top_label(p, labels)
    assert confidences.tolist() == sure
    assert correct.tolist() == right
    groups = naive_binned(sure, right, bins)
    found = binned(confidences, correct, bins)
    assert sum(found.counts) == n
    assert ece(found) == pytest.approx(math.fsum(k / n * abs(a - c) for k, c, a in groups), abs=1e-12)
    assert mce(found) == pytest.approx(max(abs(a - c) for _, c, a in groups), abs=1e-12)
    columns = [([float(x) for x in p[:, c]], [float(y == c) for y in labels]) for c in range(classes)]
    expected = math.fsum(k / n * abs(a - c) for v, h in columns for k, c, a in naive_binned(v, h, bins)) / classes
    assert classwise_ece(p, labels, bins) == pytest.approx(expected, abs=1e-12)
    adaptive = naive_adaptive(sure, right, bins)
    assert ace_top(confidences, correct, bins) == pytest.approx(math.fsum(k / n * g for k, g in adaptive), abs=1e-12)
    each = [[g for _, g in naive_adaptive(v, h, bins)] for v, h in columns]
    expected = math.fsum(math.fsum(gaps) / len(gaps) for gaps in each) / classes
    assert ace_class(p, labels, bins) == pytest.approx(expected, abs=1e-12)
    kept = [(v, h) for vs, hs in columns for v, h in zip(vs, hs, strict=True) if v >= 0.1]
    pooled = naive_adaptive([v for v, _ in kept], [h for _, h in kept], bins)
    expected = math.fsum(k * g for k, g in pooled) / len(kept)
    assert tace(p, labels, bins, 0.1) == pytest.approx(expected, abs=1e-12)
    squares = [
        math.fsum((float(x) - (c == y)) ** 2 for c, x in enumerate(row)) for row, y in zip(p, labels, strict=True)
    ]
    assert brier(p, labels) == pytest.approx(math.fsum(squares) / n, abs=1e-12)
    losses = [-math.log(row[y]) for row, y in zip(p, labels, strict=True)]
    assert nll(np.log(p), labels) == pytest.approx(math.fsum(losses) / n, abs=1e-12)


def test_edges_belong_to_the_bin_below() -> None:
    for bins in (3, 10, 15):
        for b in range(bins + 1):
            edge = float(Fraction(b, bins))
            counts = binned(np.array([edge]), np.array([1.0]), bins).counts
            assert counts.argmax() == max(0, b - 1), (bins, b)


def test_closed_cases() -> None:
    sure, right = np.array([0.8] * 5), np.array([1.0, 1.0, 1.0, 1.0, 0.0])
    assert ece(binned(sure, right, 10)) == pytest.approx(0.0, abs=1e-15)
    assert ece(binned(sure, 1 - right, 10)) == pytest.approx(0.6)
    p, labels = np.array([[1.0, 0.0, 0.0]] * 4), np.array([1, 1, 1, 1])
    assert brier(p, labels) == 2.0  # the worst there is
    assert ece(binned(*top_label(p, labels), 10)) == 1.0
    assert classwise_ece(p, labels, 10) == pytest.approx(2 / 3)
    assert brier(p, np.zeros(4, dtype=int)) == 0.0
    found = binned(np.array([0.95, 0.95, 0.95, 0.15]), np.array([1.0, 1.0, 1.0, 1.0]), 10)
    assert mce(found) == pytest.approx(0.85)
    assert mce(found, min_count=2) == pytest.approx(0.05)
    assert math.isnan(mce(found, min_count=9))


def test_a_threshold_comes_before_the_bins_and_labels_stay_with_their_probabilities() -> None:
    """A known wrong order, probabilities row by row and labels class by class, is far off on calibrated data."""
    p, labels = calibrated(4000, 4)
    hits = np.eye(4)[labels]
    wrong = naive_adaptive(p.ravel().tolist(), hits.T.ravel().tolist(), 10)
    right = naive_adaptive(p.ravel().tolist(), hits.ravel().tolist(), 10)
    mean = [math.fsum(k * g for k, g in cuts) / p.size for cuts in (wrong, right)]
    assert mean[0] > 0.1 > 0.02 > mean[1]
    assert tace(p, labels, 10, 1e-9) == pytest.approx(mean[1], abs=1e-12)
    late = naive_adaptive(p.ravel().tolist(), hits.ravel().tolist(), 10)[5:]  # binned first
    assert tace(p, labels, 10, 0.2) != pytest.approx(math.fsum(k * g for k, g in late) / sum(k for k, _ in late))
    assert math.isnan(tace(np.full((3, 4), 0.25), np.zeros(3, dtype=int), 10, 0.9))


def test_calibrated_predictions_have_small_errors() -> None:
    p, labels = calibrated(20_000, 3, seed=1)
    found = dict(measures_of_choices(np.log(p), labels, bins=15, min_count=100, threshold=0.01, same_classes=True))
    assert all(found[name] < 0.02 for name in ("ece", "classwise_ece", "ace_top", "ace_class", "tace"))
    assert found["mce"] < 0.05


def test_fewer_rows_than_bins_are_a_bin_each() -> None:
    sure, right = np.array([0.9, 0.5, 0.7]), np.array([1.0, 0.0, 1.0])
    assert ace_top(sure, right, 10) == pytest.approx((0.1 + 0.5 + 0.3) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_rows_does_not_matter_where_confidences_are_equal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = np.round(example(200, 3)[0], 1)
    labels = example(200, 3)[1]
    order = rng.permutation(200)
    assert ace_class(p, labels, 10) == pytest.approx(ace_class(p[order], labels[order], 10), abs=1e-12)
    assert tace(p, labels, 10) == pytest.approx(tace(p[order], labels[order], 10), abs=1e-12)


def test_a_temperature_is_the_best_of_a_grid_and_undoes_one() -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(3000, 4)) * 3
    labels = np.array([rng.choice(4, p=row) for row in np.exp(log_probabilities(scores, 2.5))])
    found = fit_temperature(scores, labels)
    assert not found.at_limit
    assert found.value == pytest.approx(2.5, rel=0.1)
    grid = np.geomspace(0.5, 10, 2001)
    best = grid[np.argmin([nll(log_probabilities(scores, t), labels) for t in grid])]
    assert found.value == pytest.approx(best, rel=2e-3)
    assert fit_temperature(scores, scores.argmax(1)).at_limit  # all right: the colder the better
    assert fit_temperature(scores, scores.argmin(1)).value == 100.0


@pytest.mark.parametrize("offset", [0.0, 100.0, -1e6])
def test_rows_that_are_all_right_have_no_best_temperature_wherever_their_scores_lie(offset: float) -> None:
    """Scores of longer texts are far below 0, where a mean of them is rounded to more than the largest."""
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=(rng.integers(1, 6), 5)) * 10 + offset
        found = fit_temperature(scores, scores.argmax(1))
        assert (found.value, found.at_limit) == (0.01, True), seed


def test_missing_choices_have_no_probability() -> None:
    scores = np.array([[0.0, 1.0, -np.inf], [0.3, 0.2, 0.1], [1.0, 0.0, -np.inf], [0.0, 0.5, 0.7]])
    labels = np.array([0, 2, 1, 0])
    p = np.exp(log_probabilities(scores))
    assert p[0, 2] == 0.0
    assert p.sum(1) == pytest.approx(np.ones(4))
    assert math.isfinite(fit_temperature(scores, labels).value)
    expected = (
        2 * (1 - p[0, 0]) ** 2 + sum((p[1] - [0, 0, 1]) ** 2) + 2 * (1 - p[2, 1]) ** 2 + sum((p[3] - [1, 0, 0]) ** 2)
    ) / 4
    assert brier(p, labels) == pytest.approx(expected)


def test_scaled_rows_were_never_fitted_on() -> None:
    p, labels = example(103, 3, seed=4)
    scores = np.log(p)
    whole = scaled(scores, labels, folds=5, seed=7)
    assert whole.rows.tolist() == list(range(103))
    assert len(whole.temperatures) == 5
    assert whole.log_p == pytest.approx(scaled(scores, labels, folds=5, seed=7).log_p)
    parts = {}
    for row in range(103):  # which of the temperatures each row has
        parts[row] = int(
            np.argmin(
                [np.abs(log_probabilities(scores[[row]], t.value) - whole.log_p[row]).max() for t in whole.temperatures]
            )
        )
    for part, temperature in enumerate(whole.temperatures):
        others = np.array([row for row in range(103) if parts[row] != part])
        assert len(others) in (82, 83)
        assert fit_temperature(scores[others], labels[others]).value == pytest.approx(temperature.value, rel=1e-9)
    half = scaled(scores, labels, folds=1, seed=7)
    assert len(half.rows) == 51
    rest = np.setdiff1d(np.arange(103), half.rows)
    assert half.temperatures[0].value == pytest.approx(fit_temperature(scores[rest], labels[rest]).value)
    with pytest.raises(UsageError, match="3 rows are too few"):
        scaled(scores[:3], labels[:3], folds=5, seed=0)


def test_without_confidences_there_are_no_measures() -> None:
    sure = np.array([0.5])
    some = dict(measures_of_confidence(sure, sure, bins=10, min_count=1))
    none = dict(measures_of_confidence(sure[:0], sure[:0], bins=10, min_count=1))
    assert list(none) == list(some)
    assert all(math.isnan(value) for value in none.values())


def test_measures_of_confidence_are_those_of_two_classes() -> None:
    rng = np.random.default_rng(5)
    sure = rng.uniform(size=200)
    right = (rng.uniform(size=200) < sure**2).astype(float)
    found = dict(measures_of_confidence(sure, right, bins=10, min_count=1))
    groups = naive_binned(sure.tolist(), right.tolist(), 10)
    assert found["ece"] == pytest.approx(sum(k / 200 * abs(a - c) for k, c, a in groups))
    assert found["brier"] == pytest.approx(sum((c - y) ** 2 for c, y in zip(sure, right, strict=True)) / 200)
    assert found["confidence"] == pytest.approx(sum(sure) / 200)
