"""Intruder dimensions of an adapter: singular vectors of the tuned weights that the base does not have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd

    from loratools.reports.frames import Kind


@dataclass(frozen=True)
class Side:
    """One side of a matrix: the largest |cosine| of each of the first singular vectors with any of the base.

    `max_cosine` is an upper and `min_cosine` a lower bound on it: one number for a dense verdict, proven for a
    certified one. `indices` are the intruders; `matched_cosine` is that with the vector of the same index.
    """

    count: int
    indices: tuple[int, ...]
    max_cosine: tuple[float, ...]
    min_cosine: tuple[float, ...]
    matched_cosine: tuple[float, ...]


@dataclass(frozen=True)
class TargetIntruders:
    """One matrix: left is the output side. `energy_share` is that of left intruders among the squared `values`.

    `verdict` is "dense" (all singular vectors of the base were computed) or "certified" (bounds decided).
    `mitigated_norm` is the norm of the mitigated update as a share of the old one, where there was a mitigation.
    """

    left: Side
    right: Side
    values: tuple[float, ...]
    energy_share: float
    verdict: str
    layer: str = ""
    module: str = ""
    mitigated_norm: float | None = None


@dataclass(frozen=True)
class Count:
    """Intruders among some matrices."""

    matrices: int
    left: int
    right: int


@dataclass(frozen=True)
class IntrudersReport:
    """`sweep`: threshold -> side -> count, over all targets, at epsilon and at whatever else was asked for; `by_k`: the
    same for the first 1, 2, ..., top_k singular vectors, at epsilon; `layers` and `modules`: counts by place;
    `uniform_shrink`: the factor on all updates that would have changed their norm as much as the mitigation did."""

    # Of rows(), in this order.
    columns: ClassVar[Mapping[str, Kind]] = {
        "target": "text",
        "layer": "text",
        "module": "text",
        "side": "text",
        "index": "integer",
        "value": "number",
        "max_cosine": "number",
        "min_cosine": "number",
        "matched_cosine": "number",
        "intruder": "flag",
        "energy_share": "number",
        "verdict": "text",
        "mitigated_norm": "number",
    }

    top_k: int
    epsilon: float
    targets: Mapping[str, TargetIntruders]
    total: Mapping[str, float | int]
    sweep: Mapping[str, Mapping[str, int]]
    by_k: Mapping[str, Mapping[str, int]]
    layers: Mapping[str, Count]
    modules: Mapping[str, Count]
    skipped: Mapping[str, str]
    warnings: tuple[str, ...]
    uniform_shrink: float | None = None
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each examined singular vector: target, side ("left" or "right"), index from 0.

        The keys are those of `columns`; the last three are of the target.
        """
        for name, target in self.targets.items():
            for label, side in (("left", target.left), ("right", target.right)):
                numbers = zip(target.values, side.max_cosine, side.min_cosine, side.matched_cosine, strict=True)
                for index, (value, largest, least, matched) in enumerate(numbers):
                    yield {
                        "target": name,
                        "layer": target.layer,
                        "module": target.module,
                        "side": label,
                        "index": index,
                        "value": value,
                        "max_cosine": largest,
                        "min_cosine": least,
                        "matched_cosine": matched,
                        "intruder": index in side.indices,
                        "energy_share": target.energy_share,
                        "verdict": target.verdict,
                        "mitigated_norm": target.mitigated_norm,
                    }

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame; MissingExtraError without pandas."""
        from loratools.reports.frames import to_frame

        return to_frame(self)
