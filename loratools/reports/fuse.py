"""What a fused checkpoint is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FusedParameter:
    """One parameter that was changed.

    `sources`: the targets of the adapter that change it, and tensors that replace it. `relative_change` is
    ||W' - W|| / ||W||, and `lost` the share of the change, in norm, that rounding to the base's dtype took away.
    """

    sources: tuple[str, ...]
    relative_change: float
    lost: float


@dataclass(frozen=True)
class FuseReport:
    """The parameters that differ from the base, and what was left out of the fused model."""

    output: str
    parameters: Mapping[str, FusedParameter]
    files: tuple[str, ...]
    skipped: Mapping[str, str]
    total: Mapping[str, float]
    bytes: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
