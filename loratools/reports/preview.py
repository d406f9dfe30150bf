"""What a squeeze would cost and save, before it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TargetPreview:
    """One target at the chosen rank; what only its spectrum tells is None while that is not measured.

    `squared_error` is the energy of the singular values that are cut off: that of the best approximation of the rank
    before it is rounded to the stored dtypes.
    """

    rank_before: int
    rank_after: int | None  # None while the rule needs a spectrum
    bytes_before: int
    bytes_after: int | None
    squared_norm: float | None
    squared_error: float | None
    unchanged: str | None  # why it is carried over, where it is

    @property
    def energy_kept(self) -> float | None:
        """Share of the squared spectrum; 1 for a zero update."""
        return energy_kept([self])

    @property
    def relative_error(self) -> float | None:
        """||delta - its approximation|| / ||delta||; 0 for a zero update."""
        return relative_error([self])


@dataclass(frozen=True)
class Preview:
    """A whole adapter at the chosen ranks.

    `bytes_after` is the size of the weights file that a squeeze writes, to the byte in safetensors; None while ranks
    are unknown. `energy_kept` and `relative_error` are over every measured target, changed or not. `refused` says why a
    squeeze to these ranks would fail, where it would.
    """

    targets: Mapping[str, TargetPreview]
    bytes_before: int
    bytes_after: int | None
    energy_kept: float | None
    relative_error: float | None
    refused: str | None = None

    @property
    def changed(self) -> int:
        """Targets that get a lower rank."""
        return sum(t.unchanged is None and t.rank_after is not None for t in self.targets.values())

    @property
    def unmeasured(self) -> int:
        """Targets whose spectrum is not known."""
        return sum(t.squared_norm is None for t in self.targets.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"changed": self.changed, "unmeasured": self.unmeasured}


def energy_kept(targets: Iterable[TargetPreview]) -> float | None:
    """The share of all energy that the measured of some targets keep together; None where none is measured."""
    norm, error = _sums(targets)
    return None if norm is None else max(0.0, 1.0 - error / norm) if norm else 1.0


def relative_error(targets: Iterable[TargetPreview]) -> float | None:
    """The relative error of the measured of some targets together; None where none is measured."""
    norm, error = _sums(targets)
    return None if norm is None else math.sqrt(error / norm) if norm else 0.0


def _sums(targets: Iterable[TargetPreview]) -> tuple[float | None, float]:
    known = [(t.squared_norm, t.squared_error) for t in targets if t.squared_norm is not None]
    if not known:
        return None, 0.0
    return math.fsum(norm for norm, _ in known), math.fsum(error for _, error in known if error is not None)
