"""How two adapters differ, target by target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TargetDiff:
    """Update a against update b of one target.

    `relative_error` is ||a - b|| / ||a|| (null where only a vanishes), `cosine` that of the deltas (null where one
    vanishes). An overlap is the mean squared cosine of the principal angles between the output spaces or the input
    spaces: 1 where the smaller lies in the larger.
    """

    rank_a: int
    rank_b: int
    relative_error: float | None
    cosine: float | None
    output_overlap: float | None
    input_overlap: float | None


@dataclass(frozen=True)
class DiffReport:
    """`same`: every target is in both, and no relative error exceeds the tolerance; biases and extras agree too."""

    same: bool
    tolerance: float
    targets: Mapping[str, TargetDiff]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    extras: Mapping[str, str]
    total: Mapping[str, float | int | None]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "tolerance": self.tolerance,
            "targets": {target: asdict(diff) for target, diff in self.targets.items()},
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "extras": dict(self.extras),
            "total": dict(self.total),
            "warnings": list(self.warnings),
        }
