"""How much each labelled input counts, by how sure its teacher was (LoRA3D's robust weight, arXiv 2412.07746)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Final, Literal

Weighing = Literal["none", "confidence", "robust"]
_DROPPED: Final = 0.2  # of the rows, those of the least weight


def robust_weights(confidences: Sequence[float], disagreements: Sequence[float]) -> list[float]:
    """c / (1 + e / mu)^2 of confidences c and disagreements e, scaled to a mean of 1; 0 below the 20th percentile.

    It minimises w e + mu (sqrt(w) - sqrt(c))^2, the Geman-McClure loss by duality. mu is the median of e; where more
    than half of the rows have none, that of those which have some.
    """
    some = [e for e in disagreements if e > 0]
    mu = median(disagreements) if disagreements else 0.0
    if mu <= 0:
        mu = median(some) if some else 1.0
    weights = [c / (1 + e / mu) ** 2 for c, e in zip(confidences, disagreements, strict=True)]
    least = sorted(weights)[math.floor(_DROPPED * len(weights))] if weights else 0.0
    return _mean_of_one([w if w >= least else 0.0 for w in weights])


def confidence_weights(confidences: Sequence[float]) -> list[float]:
    """Confidences, scaled to a mean of 1."""
    return _mean_of_one(confidences)


def edit_share(one: Sequence[int], other: Sequence[int]) -> float:
    """Levenshtein's distance as a share of the longer sequence; 0 for two empty ones."""
    before = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        now = [i]
        for j, b in enumerate(other, 1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (a != b)))
        before = now
    return before[-1] / max(len(one), len(other), 1)


def _mean_of_one(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [w * len(weights) / total if total > 0 else 1.0 for w in weights]
