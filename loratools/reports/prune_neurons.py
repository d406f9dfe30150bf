"""What pruning made of nonlinear bottlenecks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PrunedTarget:
    """One bottleneck. `constant`, `duplicates` and `zero` count units that went exactly; the others were fitted away.

    `error` is |y' - y| / |y| of what the bottleneck adds, as stored, on the activations that the fit saw, and
    `held_out_error` on those that it did not; null where there were none.
    """

    width_before: int
    width_after: int
    constant: int
    duplicates: int
    zero: int
    error: float | None
    held_out_error: float | None


@dataclass(frozen=True)
class PruneNeuronsReport:
    """`tokens` and `held_out_tokens` are of one bottleneck, the smallest numbers; 0 without activations."""

    targets: Mapping[str, PrunedTarget]
    tokens: int
    held_out_tokens: int
    total: Mapping[str, int]
    output: str = ""
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
