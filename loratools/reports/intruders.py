"""Intruder dimensions of an adapter: singular vectors of the tuned weights that the base does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Side:
    """One side of a matrix: the largest |cosine| of each of the first singular vectors with any of the base.

    `max_cosine` is an upper and `min_cosine` a lower bound on it: one number for a dense verdict, proven for a
    certified one. `indices` are the intruders; `matched_cosine` is that with the vector of the same index.
    """

    count: int
    indices: tuple[int, ...]
    max_cosine: tuple[float, ...]
    min_cosine: tuple[float, ...]
    matched_cosine: tuple[float, ...]


@dataclass(frozen=True)
class TargetIntruders:
    """One matrix: left is the output side. `energy_share` is that of left intruders among the squared `values`.

    `verdict` is "dense" (all singular vectors of the base were computed) or "certified" (bounds decided).
    `mitigated_norm` is the norm of the mitigated update as a share of the old one, where there was a mitigation.
    """

    left: Side
    right: Side
    values: tuple[float, ...]
    energy_share: float
    verdict: str
    mitigated_norm: float | None = None


@dataclass(frozen=True)
class IntrudersReport:
    """`sweep`: threshold -> side -> count, over all targets, for the thresholds at which every verdict is known;
    `uniform_shrink`: the factor on all updates that would have changed their norm as much as the mitigation did."""

    top_k: int
    epsilon: float
    targets: Mapping[str, TargetIntruders]
    total: Mapping[str, float | int]
    sweep: Mapping[str, Mapping[str, int]]
    skipped: Mapping[str, str]
    warnings: tuple[str, ...]
    uniform_shrink: float | None = None
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
