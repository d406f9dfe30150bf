"""Whether a model knows how sure it may be: calibration errors of its probabilities, by their textbook formulas.

Scores are (n, c) logarithms of any weights, -inf where a row lacks a class; labels are (n,) indices of the right class.
Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loratools.errors import UsageError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_COLDEST, _HOTTEST = 0.01, 100.0  # temperatures that are looked for


@dataclass(frozen=True, eq=False)
class Binned:
    """Predictions by equal widths of their confidence: bin b holds (b / n, (b + 1) / n], the first 0 as well.

    Of an empty bin, mean confidence and accuracy are NaN.
    """

    counts: Integers
    confidence: Floats
    accuracy: Floats

    @property
    def gaps(self) -> Floats:
        """|accuracy - confidence| of each bin."""
        return np.abs(self.accuracy - self.confidence)


def log_probabilities(scores: Floats, temperature: float = 1.0) -> Floats:
    """(n, c) log-softmax of the scores over `temperature`."""
    scaled = np.asarray(scores, dtype=np.float64) / temperature
    top = scaled.max(axis=1, keepdims=True)
    shifted: Floats = scaled - top
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def top_label(probabilities: Floats, labels: Integers) -> tuple[Floats, Floats]:
    """The largest probability of each row, and 1 where it is that of the label, else 0; of equals the first counts."""
    chosen = probabilities.argmax(axis=1)
    return probabilities[np.arange(len(chosen)), chosen], (chosen == labels).astype(np.float64)


def binned(confidences: Floats, correct: Floats, bins: int) -> Binned:
    """Confidences and whether they were right, in bins of equal width."""
    place = _equal_width(confidences, bins)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(place, confidences, bins) / counts
        accuracy = np.bincount(place, correct, bins) / counts
    return Binned(counts.astype(np.int64), confidence, accuracy)


def ece(found: Binned) -> float:
    """Expected calibration error: sum_b n_b / N |acc_b - conf_b|."""
    return float(np.nansum(found.counts * found.gaps) / found.counts.sum())


def mce(found: Binned, min_count: int = 1) -> float:
    """Maximum calibration error, of the bins with at least `min_count` predictions; NaN where there is none."""
    kept = found.gaps[found.counts >= max(1, min_count)]
    return float(kept.max()) if len(kept) else float("nan")


def classwise_ece(probabilities: Floats, labels: Integers, bins: int) -> float:
    """(1/C) sum_c sum_b n_bc / N |freq_bc - mean p_bc|, equal widths."""
    n, classes = probabilities.shape
    place = _equal_width(probabilities, bins) + bins * np.arange(classes)
    surplus = _one_hot(probabilities, labels) - probabilities
    sums = np.bincount(place.ravel(), surplus.ravel(), bins * classes)  # n_bc (freq_bc - mean p_bc)
    return float(np.abs(sums).sum() / (n * classes))


def ace_top(confidences: Floats, correct: Floats, bins: int) -> float:
    """Adaptive calibration error of the top label: bins of equally many, each weighed by how many it holds."""
    gaps, counts = _equal_mass(confidences, correct, bins)
    return float((gaps * counts).sum() / counts.sum())


def ace_class(probabilities: Floats, labels: Integers, bins: int) -> float:
    """Adaptive calibration error of Nixon et al.: (1/(C R)) sum_c sum_r |acc_cr - conf_cr|, unweighted."""
    hits = _one_hot(probabilities, labels)
    columns = zip(probabilities.T, hits.T, strict=True)
    return float(np.mean([_equal_mass(p, hit, bins)[0].mean() for p, hit in columns]))


def tace(probabilities: Floats, labels: Integers, bins: int, threshold: float = 0.01) -> float:
    """Adaptive calibration error of all probabilities of all classes that reach `threshold`, which is applied first.

    NaN where none reaches it.
    """
    kept = probabilities >= threshold
    if not kept.any():
        return float("nan")
    gaps, counts = _equal_mass(probabilities[kept], _one_hot(probabilities, labels)[kept], bins)
    return float((gaps * counts).sum() / counts.sum())


def brier(probabilities: Floats, labels: Integers) -> float:
    """Mean over rows of sum_c (p_c - y_c)^2: from 0 to 2."""
    return float(np.square(probabilities - _one_hot(probabilities, labels)).sum(axis=1).mean())


def nll(log_p: Floats, labels: Integers) -> float:
    """Mean negative log-probability of the labels, in nats."""
    return float(-log_p[np.arange(len(labels)), labels].mean())


@dataclass(frozen=True)
class Temperature:
    """The temperature with the least NLL; `at_limit`: the least is at the end of the range that was searched."""

    value: float
    at_limit: bool


def fit_temperature(scores: Floats, labels: Integers) -> Temperature:
    """The temperature of least NLL, between 0.01 and 100; the NLL is convex in its inverse, so there is one."""
    scores = np.asarray(scores, dtype=np.float64)
    # differences first: where all rows are right each of them is below 0, and no rounding hides it
    above = scores - scores[np.arange(len(labels)), labels][:, None]
    above[np.isneginf(above)] = 0.0

    def slope(temperature: float) -> float:
        """Of the NLL in 1 / temperature: mean of E[score] - score of the label; it falls as it gets hotter."""
        p = np.exp(log_probabilities(scores, temperature))
        return float((p * above).sum(axis=1).mean())

    low, high = _COLDEST, _HOTTEST
    if slope(low) <= 0:
        return Temperature(low, at_limit=True)
    if slope(high) >= 0:
        return Temperature(high, at_limit=True)
    for _ in range(100):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return Temperature(float(np.sqrt(low * high)), at_limit=False)


@dataclass(frozen=True, eq=False)
class Scaled:
    """Temperatures, and the log-probabilities that they give to `rows`, none of which they were fitted on."""

    temperatures: tuple[Temperature, ...]
    rows: Integers
    log_p: Floats


def scaled(scores: Floats, labels: Integers, *, folds: int, seed: int) -> Scaled:
    """Each of `folds` parts of the rows at the temperature of all other rows; with 1 fold, a half at that of the other.

    The parts are drawn by `seed`. UsageError for fewer rows than parts.
    """
    n, parts = len(labels), max(2, folds)
    if n < parts:
        raise UsageError(f"{n} rows are too few to fit a temperature on some and judge it on others; give {parts}")
    order = np.random.default_rng(seed).permutation(n)
    held = [np.sort(part) for part in np.array_split(order, parts)]
    if folds < 2:
        held = held[1:]
    temperatures, log_p = [], []
    for part in held:
        rest = np.setdiff1d(order, part)
        temperatures.append(fit_temperature(scores[rest], labels[rest]))
        log_p.append(log_probabilities(scores[part], temperatures[-1].value))
    rows = np.concatenate(held)
    back = np.argsort(rows)
    return Scaled(tuple(temperatures), rows[back], np.concatenate(log_p)[back])


def measures_of_choices(
    log_p: Floats, labels: Integers, *, bins: int, min_count: int, threshold: float, same_classes: bool
) -> Iterator[tuple[str, float]]:
    """(name, value) of all measures above; those by class only where every row has the `same_classes`."""
    probabilities = np.exp(log_p)
    confidences, correct = top_label(probabilities, labels)
    found = binned(confidences, correct, bins)
    yield "ece", ece(found)
    yield "mce", mce(found, min_count)
    if same_classes:
        yield "classwise_ece", classwise_ece(probabilities, labels, bins)
    yield "ace_top", ace_top(confidences, correct, bins)
    if same_classes:
        yield "ace_class", ace_class(probabilities, labels, bins)
    yield "tace", tace(probabilities, labels, bins, threshold)
    yield "brier", brier(probabilities, labels)


def measures_of_confidence(
    confidences: Floats, correct: Floats, *, bins: int, min_count: int
) -> Iterator[tuple[str, float]]:
    """(name, value) of the measures of single confidences; the Brier score is the mean of (confidence - correct)^2.

    NaN, all of them, where there is none.
    """
    if not len(confidences):
        yield from dict.fromkeys(("confidence", "ece", "mce", "ace_top", "brier"), float("nan")).items()
        return
    found = binned(confidences, correct, bins)
    yield "confidence", float(confidences.mean())
    yield "ece", ece(found)
    yield "mce", mce(found, min_count)
    yield "ace_top", ace_top(confidences, correct, bins)
    yield "brier", float(np.square(confidences - correct).mean())


def _equal_width(values: Floats, bins: int) -> Integers:
    """The bin of each value: (l, u], the first closed at 0."""
    edges = np.arange(1, bins) / bins
    return np.searchsorted(edges, values, side="left")


def _equal_mass(values: Floats, hits: Floats, bins: int) -> tuple[Floats, Integers]:
    """|mean hit - mean value| of bins of floor(n / bins) values in their order, and how many each holds.

    What is left over goes to the last bin; fewer values than bins are a bin each. Equal values share their mean hit,
    so that the order of the rows does not matter.
    """
    order = np.argsort(values, kind="stable")
    values, hits = values[order], hits[order]
    _, first, count = np.unique(values, return_index=True, return_counts=True)
    hits = np.repeat(np.add.reduceat(hits, first) / count, count)
    n = len(values)
    bins = min(bins, n)
    starts = np.arange(bins) * (n // bins)
    counts = np.diff(np.append(starts, n))
    return np.abs(np.add.reduceat(hits - values, starts)) / counts, counts


def _one_hot(probabilities: Floats, labels: Integers) -> Floats:
    hits = np.zeros_like(probabilities)
    hits[np.arange(len(labels)), labels] = 1.0
    return hits
