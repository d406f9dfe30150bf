"""Bytes against error: every method at every setting, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd

    from loratools.reports.frames import Kind


@dataclass(frozen=True)
class Point:
    """One way to write the adapter: bytes of the file, and ||delta - delta as decoded|| / ||delta|| of all together.

    `weighted_error` is the same in the norm of the statistics of inputs, None without them. `best`: whether no other
    point has an error as low for as few bytes. `command` is what makes it, IN being the adapter.
    """

    method: str
    setting: str
    bytes: int
    relative_error: float
    weighted_error: float | None
    best: bool
    command: str


@dataclass(frozen=True)
class ParetoReport:
    """The points by size, largest first; `bytes` is the size of the adapter itself."""

    columns: ClassVar[Mapping[str, Kind]] = {
        "method": "text",
        "setting": "text",
        "bytes": "integer",
        "relative_error": "number",
        "weighted_error": "number",
        "best": "flag",
        "command": "text",
    }

    bytes: int
    points: tuple[Point, ...]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"bytes": self.bytes, "points": [asdict(p) for p in self.points], "warnings": list(self.warnings)}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each point, with the keys of `columns`."""
        for point in self.points:
            yield asdict(point)

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame; MissingExtraError without pandas."""
        from loratools.reports.frames import to_frame

        return to_frame(self)
