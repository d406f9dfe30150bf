"""What a merge made of each module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TargetMerge:
    """One target of the output.

    `ranks_in` and `cosines` are in the order of the adapters, null where an adapter lacks the target (or, for a cosine,
    has a zero update); a cosine is that of the adapter's delta and the exact merge. `relative_error` is ||merge - merge
    as stored|| / ||merge||. `sign_conflicts`, of ties and knots alone, is the share of entries for which deltas of both
    signs were kept.
    """

    ranks_in: tuple[int | None, ...]
    rank_out: int
    relative_error: float
    cosines: tuple[float | None, ...]
    sign_conflicts: float | None
    bytes: int


@dataclass(frozen=True)
class MergeReport:
    """`partial` names the targets that some adapters lack, with the adapters that have them, counted from 1."""

    method: str
    weights: tuple[float, ...]
    targets: Mapping[str, TargetMerge]
    partial: Mapping[str, tuple[int, ...]]
    dropped_extras: tuple[str, ...]
    total: Mapping[str, float | int]
    warnings: tuple[str, ...] = ()
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "weights": list(self.weights),
            "targets": {target: asdict(row) for target, row in self.targets.items()},
            "partial": {target: list(holders) for target, holders in self.partial.items()},
            "dropped_extras": list(self.dropped_extras),
            "total": dict(self.total),
            "warnings": list(self.warnings),
            "output": self.output,
        }


def totals(rows: Mapping[str, TargetMerge], squares: Sequence[tuple[float, float]], nbytes: int) -> dict[str, Any]:
    """Over all targets, weighed by their size; `squares` are (||error||^2, ||merge||^2)."""
    error, norm = (math.fsum(column) for column in zip(*squares, strict=True))
    return {
        "targets": len(rows),
        "rank_out": max(row.rank_out for row in rows.values()),
        "relative_error": math.sqrt(error / norm) if norm else 0.0,
        "norm": math.sqrt(norm),
        "bytes": nbytes,
    }
