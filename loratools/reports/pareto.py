"""Bytes against error: every method at every setting, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd

    from loratools.reports.evaluate import Evaluation
    from loratools.reports.frames import Kind


@dataclass(frozen=True)
class Point:
    """One way to write the adapter: bytes of the file, and ||delta - delta as decoded|| / ||delta|| of all together.

    `weighted_error` is the same in the norm of the inputs, None without statistics of them. `best`: whether no other
    point has an error as low for as few bytes. `command` is what makes it, IN being the adapter, or BASE and TUNED the
    two models. `nll` and `exact_match` are as in `Evaluation`, None where nothing was evaluated.
    """

    method: str
    setting: str
    bytes: int
    relative_error: float
    weighted_error: float | None
    best: bool
    command: str
    nll: float | None = None
    exact_match: float | None = None


@dataclass(frozen=True)
class ParetoReport:
    """The points by size, largest first; `bytes` is the size of the adapter itself.

    `evaluated`: how the base alone ("base") and with the adapter as it is ("adapter") do the task, where one was given.
    """

    columns: ClassVar[Mapping[str, Kind]] = {
        "method": "text",
        "setting": "text",
        "bytes": "integer",
        "relative_error": "number",
        "weighted_error": "number",
        "best": "flag",
        "command": "text",
        "nll": "number",
        "exact_match": "number",
    }

    bytes: int
    points: tuple[Point, ...]
    warnings: tuple[str, ...] = ()
    evaluated: Mapping[str, Evaluation] = field(default_factory=dict)

    @property
    def is_weighted(self) -> bool:
        """Whether the best are chosen by the error that inputs see."""
        return all(point.weighted_error is not None for point in self.points)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "bytes": self.bytes,
            "points": [asdict(p) for p in self.points],
            "warnings": list(self.warnings),
            "evaluated": {name: found.to_dict() for name, found in self.evaluated.items()},
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each point, with the keys of `columns`."""
        for point in self.points:
            yield asdict(point)

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame; MissingExtraError without pandas."""
        from loratools.reports.frames import to_frame

        return to_frame(self)
