"""What each branch of a Hydra does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class HydraBranch:
    """One branch of one target: its rank, its norm, and how much of it reads what the base reads.

    `inside`: the share of its squared norm whose rows lie in the span of the base's leading right singular vectors;
    `cosines`: those of the principal angles between its row space and theirs, descending.
    """

    rank: int
    norm: float
    inside: float
    cosines: tuple[float, ...]


@dataclass(frozen=True)
class HydraTarget:
    """Both branches, None where the file has one alone; `norm` is that of the delta, and `cosine` that of the two."""

    parallel: HydraBranch | None
    sequential: HydraBranch | None
    norm: float
    cosine: float | None


@dataclass(frozen=True)
class HydraReport:
    """Every Hydra target, and the number of the base's leading singular vectors that it was compared with."""

    top: int
    targets: Mapping[str, HydraTarget]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
