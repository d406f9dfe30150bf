"""What writing deltas in another family did to each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TargetFitted:
    """One target before and after.

    `numbers` are stored for it alone, `bytes` what they take; `relative_error` is ||delta - delta as stored|| /
    ||delta||, and `energy_kept` the share of the squared norm that remains, 1 - relative_error^2.
    """

    family_before: str
    rank: int
    numbers: int
    bytes: int
    relative_error: float
    energy_kept: float


@dataclass(frozen=True)
class ReparameterizeReport:
    """Every target of the input is in `targets` or, with the reason, in `unchanged`.

    `guarantee` says of the fits that they are exact, the optimal one of the family with these options, or a local
    optimum. `expected_energy` is what a generic delta keeps in a random subspace of that size, None for a family
    without one. `total` has sizes and the relative error of all deltas together; `bytes_after` counts the whole file.
    """

    family: str
    guarantee: str
    options: Mapping[str, Any]
    targets: Mapping[str, TargetFitted]
    unchanged: Mapping[str, str]
    expected_energy: float | None
    total: Mapping[str, float | int | None]
    warnings: tuple[str, ...] = ()
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **{name: getattr(self, name) for name in ("family", "guarantee", "expected_energy", "output")},
            "options": dict(self.options),
            "targets": {target: asdict(fitted) for target, fitted in self.targets.items()},
            "unchanged": dict(self.unchanged),
            "total": dict(self.total),
            "warnings": list(self.warnings),
        }
