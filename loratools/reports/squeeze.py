"""What a squeeze or a truncation did to each target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TargetChange:
    """One target before and after; `relative_error` is ||delta - delta as stored|| / ||delta||.

    `weighted_error` is the same of delta C^(1/2), before rounding to what is stored, where the squeeze had statistics
    of the inputs, C = E[x x^T]; `energy_kept` is then a share of those weighted squares. Null without statistics.
    """

    rank_before: int
    rank_after: int
    energy_kept: float
    relative_error: float
    bytes_before: int
    bytes_after: int
    weighted_error: float | None = None


@dataclass(frozen=True)
class SqueezeReport:
    """Every target of the input is in `targets` or, with the reason, in `unchanged`.

    Squared norms and errors are of the deltas, so that totals weigh targets by their size.
    """

    targets: Mapping[str, TargetChange]
    unchanged: Mapping[str, str]
    total: Mapping[str, float | int]
    warnings: tuple[str, ...] = ()
    output: str | None = None
    weighted_error: float | None = None  # of all changed targets, where the squeeze had statistics of the inputs

    def to_dict(self) -> dict[str, Any]:
        return {
            "targets": {target: asdict(change) for target, change in self.targets.items()},
            "unchanged": dict(self.unchanged),
            "total": dict(self.total),
            "weighted_error": self.weighted_error,
            "warnings": list(self.warnings),
            "output": self.output,
        }


@dataclass(frozen=True)
class Outcome:
    """One target's change with the squared norms that totals are made of."""

    target: str
    change: TargetChange
    squared_norm: float
    squared_error: float
    squared_kept: float
    weighted_norm: float | None = None  # squared too, of delta C^(1/2)
    weighted_error: float = 0.0


def summarise(
    outcomes: list[Outcome],
    unchanged: Mapping[str, str],
    *,
    bytes_before: int,
    bytes_after: int,
    warnings: tuple[str, ...],
    output: str | None = None,
) -> SqueezeReport:
    """Totals over the changed targets; `bytes_*` are those of the weights files, or of all tensors without a file."""
    norm = math.fsum(o.squared_norm for o in outcomes)
    error = math.fsum(o.squared_error for o in outcomes)
    total: dict[str, float | int] = {
        "targets": len(outcomes) + len(unchanged),
        "changed": len(outcomes),
        "rank_before": max((o.change.rank_before for o in outcomes), default=0),
        "rank_after": max((o.change.rank_after for o in outcomes), default=0),
        "energy_kept": _energy_kept(outcomes, norm),
        "relative_error": math.sqrt(error / norm) if norm else 0.0,
        "bytes_before": bytes_before,
        "bytes_after": bytes_after,
    }
    notes = [*warnings]
    low = [o for o in outcomes if o.change.energy_kept < 0.5]
    if low:
        worst = min(low, key=lambda o: o.change.energy_kept)
        notes.append(
            f"less than half of the energy is kept for {len(low)} of {len(outcomes)} targets; "
            f"lowest: {worst.target} keeps {worst.change.energy_kept:.3f}"
        )
    if zero := [o.target for o in outcomes if o.squared_norm == 0.0]:
        notes.append(f"{len(zero)} targets are zero updates, as before training; first: {zero[0]}")
    if bytes_after > bytes_before:
        notes.append(f"the output is larger than the input: {bytes_after:,} bytes against {bytes_before:,}")
    ordered = {o.target: o.change for o in outcomes}
    return SqueezeReport(ordered, dict(unchanged), total, tuple(notes), output, _weighted_error(outcomes))


def _energy_kept(outcomes: list[Outcome], norm: float) -> float:
    """The share of all squares that is kept, weighted ones where there are such."""
    if (error := _weighted_error(outcomes)) is not None:
        return 1.0 - error**2
    kept = math.fsum(o.squared_kept for o in outcomes)
    return min(1.0, kept / norm) if norm else 1.0


def _weighted_error(outcomes: list[Outcome]) -> float | None:
    """Over all targets; None where the squeeze had no statistics of the inputs."""
    norms = [o.weighted_norm for o in outcomes if o.weighted_norm is not None]
    if not norms:
        return None
    total, lost = math.fsum(norms), math.fsum(o.weighted_error for o in outcomes)
    return math.sqrt(lost / total) if total else 0.0
