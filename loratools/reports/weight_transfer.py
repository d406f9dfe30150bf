"""What became of an adapter that was carried from one base to another by their weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd

    from loratools.reports.frames import Kind


@dataclass(frozen=True)
class CarriedTarget:
    """One target of the new adapter.

    `origins`: the targets that it is made of, with their shares. `method`: "same", where the two weights are equal and
    the factors are as they were; "copy", factors as they were; "projected", those within the singular spaces of the new
    weight; "bases", carried from singular vector to singular vector; "activations", by maps of what both models
    compute. `agreement`: of the leading singular spaces of the two weights, from 0 for chance to 1, None where their
    shapes differ; of activations, the cosine between mapped and real ones at places that the maps were not fitted on,
    of outputs or inputs, whichever is less. `kept`: the share of the squared norm that arrived. `relative_before` and
    `relative_after`: ||delta|| / ||W|| in the two models.
    """

    origins: Mapping[str, float]
    method: str
    rank: int
    shape_before: tuple[int, int]
    shape_after: tuple[int, int]
    agreement: float | None
    kept: float
    relative_before: float
    relative_after: float


@dataclass(frozen=True)
class WeightTransferReport:
    """`dropped`: targets of the adapter that the new one has nothing of, and why; `align`: what was asked for.

    `adapter`, `source` and `destination` are the places that were read, where they are files or names.
    """

    columns: ClassVar[Mapping[str, Kind]] = {
        "target": "text",
        "origins": "text",
        "method": "text",
        "rank": "integer",
        "agreement": "number",
        "kept": "number",
        "relative_before": "number",
        "relative_after": "number",
    }

    align: str
    targets: Mapping[str, CarriedTarget]
    dropped: Mapping[str, str]
    bytes: int
    warnings: tuple[str, ...] = ()
    output: str | None = None
    adapter: str | None = None
    source: str | None = None
    destination: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each target, with the keys of `columns`."""
        for name, row in self.targets.items():
            yield {
                "target": name,
                "origins": " ".join(row.origins),
                "method": row.method,
                "rank": row.rank,
                "agreement": row.agreement,
                "kept": row.kept,
                "relative_before": row.relative_before,
                "relative_after": row.relative_after,
            }

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame; MissingExtraError without pandas."""
        from loratools.reports.frames import to_frame

        return to_frame(self)
