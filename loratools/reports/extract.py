"""What of a fine-tuned checkpoint went into an adapter, and what did not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ExtractedTarget:
    """One matrix, at a rank, or at rank 0 as signs.

    `relative_change` is ||tuned - base|| / ||base||; `relative_error` is that of the factors as stored, as a share of
    the change; `noise` is what rounding the tuned weight to its dtype adds to any change, as a share of the change.
    """

    rank: int
    relative_change: float
    relative_error: float
    noise: float
    bytes: int


@dataclass(frozen=True)
class ExtractReport:
    """`left_out` maps changed parameters that no LoRA holds to ||change|| / ||base||; `unchanged` counts the others."""

    targets: Mapping[str, ExtractedTarget]
    left_out: Mapping[str, float]
    unchanged: int
    total: Mapping[str, float | int]
    warnings: tuple[str, ...]
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
