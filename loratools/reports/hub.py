"""What lies in a hub, and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from loratools.reports.frames import Kind, Tabular


@dataclass(frozen=True)
class Listed:
    """One adapter of a hub as its header tells; `reason` says why one cannot be read."""

    name: str
    dialect: str = ""
    families: str = ""
    targets: int = 0
    rank: int = 0
    bytes: int = 0
    base_model: str = ""
    reason: str = ""


@dataclass(frozen=True)
class HubListReport(Tabular):
    """Every place that looked like an adapter, in the order of names."""

    columns: ClassVar[Mapping[str, Kind]] = {
        "name": "text",
        "dialect": "text",
        "families": "text",
        "targets": "integer",
        "rank": "integer",
        "bytes": "integer",
        "base_model": "text",
        "reason": "text",
    }

    hub: str
    adapters: tuple[Listed, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"hub": self.hub, "adapters": [asdict(a) for a in self.adapters]}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each adapter, with the keys of `columns`."""
        for adapter in self.adapters:
            yield asdict(adapter)


@dataclass(frozen=True)
class Row:
    """One adapter: `done` now, `kept` from an earlier run, `failed` with the reason, or `stale`: not yet done again.

    `relative_error` is that of all deltas as written, None where it is not known.
    """

    name: str
    status: str
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    relative_error: float | None = None
    seconds: float = 0.0
    warnings: int = 0


@dataclass(frozen=True)
class HubRunReport(Tabular):
    """All rows, in the order of names; `missing` are adapters of the hub without any receipt, where that was asked.

    A warning says so where the hub could not be asked.
    """

    columns: ClassVar[Mapping[str, Kind]] = {
        "name": "text",
        "status": "text",
        "reason": "text",
        "bytes_before": "integer",
        "bytes_after": "integer",
        "relative_error": "number",
        "seconds": "number",
        "warnings": "integer",
    }

    output: str
    recipe: tuple[str, ...]
    adapters: tuple[Row, ...]
    missing: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())

    @property
    def counts(self) -> Mapping[str, int]:
        """How many of each status."""
        return Counter(row.status for row in self.adapters)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "output": self.output,
            "recipe": list(self.recipe),
            "counts": dict(self.counts),
            "adapters": [asdict(row) for row in self.adapters],
            "missing": list(self.missing),
            "warnings": list(self.warnings),
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each adapter, with the keys of `columns`."""
        for row in self.adapters:
            yield asdict(row)


@dataclass(frozen=True)
class CatalogReport:
    """The catalog of a hub that was written: adapters by status, sums of their bytes, and what failed with its reason.

    `missing` are adapters of the hub that was run which have no receipt yet.
    """

    output: str
    hub: str
    counts: Mapping[str, int]
    bytes_before: int
    bytes: int
    failures: tuple[tuple[str, str], ...] = ()
    missing: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"counts": dict(self.counts), "failures": dict(self.failures)}
