"""What moving an adapter between a pruned and a full model did to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ResizedTarget:
    """One target: how many outputs and inputs it had and has, and the share of its squared norm that fell away.

    The share is 0 on the way to the full model, which is exact.
    """

    outputs: tuple[int, int]
    inputs: tuple[int, int]
    dropped: float


@dataclass(frozen=True)
class ResizeReport:
    """Targets that the plan cuts, how many it leaves alone, and the share of the squared norm of all that fell away."""

    verb: str
    targets: Mapping[str, ResizedTarget]
    unchanged: int
    dropped: float
    bytes_before: int
    bytes_after: int
    warnings: tuple[str, ...] = ()
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
