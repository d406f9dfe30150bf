"""The area under a rank-accuracy curve: how well one adapter serves at all the ranks it can be cut to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from loratools.errors import UsageError


def aurac(ranks: Sequence[int], scores: Sequence[float], axis: Literal["log2", "linear"] = "log2") -> float:
    """The mean score over the ranks by the trapezoid rule, on log2 of the rank or on the rank itself.

    Both variants are those of MatryoshkaLoRA (arXiv 2605.07850): "linear" is its first, which the largest ranks
    dominate, "log2" its second. The order of the points is free; one point gives its own score.
    """
    if axis not in ("log2", "linear"):
        raise UsageError(f"axis {axis!r} is neither 'log2' nor 'linear'")
    if len(ranks) != len(scores):
        raise UsageError(f"{len(ranks)} ranks but {len(scores)} scores: give one score for each rank")
    if not ranks:
        raise UsageError("no ranks: give at least one rank with its score")
    if not all(0 < rank < math.inf for rank in ranks):
        raise UsageError(f"ranks must be positive, and {min(ranks)} to {max(ranks)} were given")
    if not all(math.isfinite(score) for score in scores):
        raise UsageError("a score is NaN or infinite")
    points = sorted(zip(ranks, scores, strict=True))
    for (low, _), (high, _) in pairwise(points):
        if low == high:
            raise UsageError(f"rank {low} is given twice: average its scores first")
    if len(points) == 1:
        return float(points[0][1])
    curve = [(math.log2(rank) if axis == "log2" else float(rank), score) for rank, score in points]
    area = math.fsum((right - left) * (a + b) / 2 for (left, a), (right, b) in pairwise(curve))
    return area / (curve[-1][0] - curve[0][0])
