"""What a mixture of adapters amounts to, and what its router does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from loratools.reports.frames import Kind, Tabular


@dataclass(frozen=True)
class RouterLayer:
    """One layer of a router, over all samples.

    `mass` is the mean share of each expert. `ess` is the mean over samples of (sum p)^2 / sum p^2, the effective number
    of experts in use at once, and `perplexity` that of exp(entropy); `ess_of_mean` is the effective number of `mass`,
    which stays high where samples go to different experts. `chosen` are the experts of most mass, counted from 1, and
    `coverage` is the mass that they hold.
    """

    mass: tuple[float, ...]
    ess: float
    perplexity: float
    ess_of_mean: float
    is_collapsed: bool
    chosen: tuple[int, ...]
    coverage: float


@dataclass(frozen=True)
class RouterReport:
    """Every layer of a router; `samples` is how many rows each mean is over."""

    samples: int
    experts: int
    layers: tuple[RouterLayer, ...]
    ess: float  # the mean over the layers
    coverage: float


@dataclass(frozen=True)
class MixtureTarget:
    """One target of a mixture of the chosen experts.

    `ranks` are those of all experts, null where one lacks the target; `chosen` counts experts from 1. `rank` is the
    numerical rank of the mixture, and `redundancy` is 1 - rank / (sum of the ranks of the chosen). `effective_rank` is
    exp of the entropy of the singular values, `stable_rank` sum s^2 / max s^2. `overlap` is the mean over pairs of the
    chosen of ||U_i^T U_j||_F^2 / r, with U the directions of the output. `change` is ||D - C|| / ||D||, where D weighs
    by the router and C equally; `weighted_change` counts it by the inputs that statistics tell of.
    """

    ranks: tuple[int | None, ...]
    chosen: tuple[int, ...]
    rank: int
    effective_rank: float
    stable_rank: float
    redundancy: float
    overlap: float | None
    change: float | None = None
    weighted_change: float | None = None


@dataclass(frozen=True)
class MixtureReport(Tabular):
    """A mixture target by target; `overlaps` and `cosines` are means over the targets that both experts have."""

    columns: ClassVar[Mapping[str, Kind]] = {
        "target": "text",
        "chosen": "numbers",
        "rank": "integer",
        "effective_rank": "number",
        "stable_rank": "number",
        "redundancy": "number",
        "overlap": "number",
        "change": "number",
        "weighted_change": "number",
    }

    experts: tuple[str, ...]
    weighting: str
    targets: Mapping[str, MixtureTarget]
    overlaps: tuple[tuple[float | None, ...], ...]
    cosines: tuple[tuple[float | None, ...], ...]
    router: RouterReport | None
    total: Mapping[str, float | int | None]
    warnings: tuple[str, ...] = ()
    output: str | None = None
    merged_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "experts": list(self.experts),
            "weighting": self.weighting,
            "targets": {target: asdict(row) for target, row in self.targets.items()},
            "overlaps": [list(row) for row in self.overlaps],
            "cosines": [list(row) for row in self.cosines],
            "router": None if self.router is None else asdict(self.router),
            "total": dict(self.total),
            "warnings": list(self.warnings),
            "output": self.output,
            "merged_error": self.merged_error,
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each target, with the keys of `columns`."""
        for target, row in self.targets.items():
            found = asdict(row)
            yield {name: target if name == "target" else found[name] for name in self.columns}
