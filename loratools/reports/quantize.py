"""What quantising did to each target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TargetCoded:
    """One target before and after; `relative_error` is ||delta - delta as decoded|| / ||delta||, None where unknown.

    `coding` says in a few words how its tensors are written. The delta of a family that needs the base is unknown
    without it; the error is then that of its low-rank part, or None.
    """

    rank_before: int
    rank_after: int
    relative_error: float | None
    coding: str


@dataclass(frozen=True)
class QuantizeReport:
    """Every target of the input is in `targets` or, with the reason, in `unchanged`.

    `total` has the sizes of the files, of which the new one is counted to the last byte, the bits to a number of the
    input that this makes, the relative error of all known deltas together, those of `unchanged` included (None where
    all that were coded need the base), and their `weighted_error`: the same in the norm of the inputs
    (linalg/input_norm.py), of the targets that the statistics know; None without statistics.
    """

    targets: Mapping[str, TargetCoded]
    unchanged: Mapping[str, str]
    total: Mapping[str, float | int | None]
    warnings: tuple[str, ...] = ()
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "targets": {target: asdict(coded) for target, coded in self.targets.items()},
            "unchanged": dict(self.unchanged),
            "total": dict(self.total),
            "warnings": list(self.warnings),
            "output": self.output,
        }
