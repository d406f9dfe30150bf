"""Every family at equal bytes, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd

    from loratools.reports.frames import Kind


@dataclass(frozen=True)
class Entrant:
    """One family within one budget of bytes.

    `bytes`: of the whole file, header included. `relative_error`: of all chosen deltas together, as stored;
    `energy_kept`: 1 - its square. `rank`: the mean rank of the deltas as stored, counting singular values above 1e-6 of
    the largest, None where the matrices are too large to ask. `best`: whether no family does better in this budget.
    """

    family: str
    budget: int
    bytes: int
    relative_error: float
    energy_kept: float
    rank: float | None
    guarantee: str
    best: bool
    command: str


@dataclass(frozen=True)
class BakeoffReport:
    """The entrants by budget, the largest first, then by error; `targets` are those that were fitted, out of
    `available`. A command makes the file of an entrant where IN holds these targets alone.

    `reference` is the low-rank optimum: (bytes, relative error) of the best ranks, target by target, before numbers are
    rounded, headers included. `left_out` says why a family took no part, in all budgets or in some.
    """

    columns: ClassVar[Mapping[str, Kind]] = {
        "family": "text",
        "budget": "integer",
        "bytes": "integer",
        "relative_error": "number",
        "energy_kept": "number",
        "rank": "number",
        "guarantee": "text",
        "best": "flag",
        "command": "text",
    }

    targets: tuple[str, ...]
    entrants: tuple[Entrant, ...]
    reference: tuple[tuple[int, float], ...]
    left_out: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    available: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "targets": list(self.targets),
            "available": self.available,
            "entrants": [asdict(e) for e in self.entrants],
            "reference": [list(point) for point in self.reference],
            "left_out": dict(self.left_out),
            "warnings": list(self.warnings),
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each entrant, with the keys of `columns`."""
        for entrant in self.entrants:
            yield asdict(entrant)

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame; MissingExtraError without pandas."""
        from loratools.reports.frames import to_frame

        return to_frame(self)
