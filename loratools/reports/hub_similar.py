"""Which adapters of a hub are copies, derivatives and sums of each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from loratools.reports.frames import Kind, Tabular

Relation = Literal["copy", "scaled copy", "derivative", "other", "same bytes"]


@dataclass(frozen=True)
class Related:
    """Two adapters, by their exact deltas: `other` is nearest to `scale` times `adapter`.

    `least_cosine` is that of the module in which they differ most; null where they share none. `same_bytes`: their
    weights files are the same, whatever their configs say; a relation by that name is of adapters whose deltas are not
    known, and has no numbers. `note` says what else the files hold.
    """

    adapter: str
    other: str
    relation: Relation
    cosine: float | None = None
    least_cosine: float | None = None
    scale: float | None = None
    shared: int = 0  # modules
    only_in_adapter: int = 0
    only_in_other: int = 0
    same_bytes: bool = False
    note: str = ""


@dataclass(frozen=True)
class Term:
    """One of the adapters that a merge is made of."""

    name: str
    weight: float


@dataclass(frozen=True)
class MergeFound:
    """An adapter that is a weighted sum of others, but for `relative_error`, of its delta."""

    adapter: str
    terms: tuple[Term, ...]
    relative_error: float


@dataclass(frozen=True)
class Cluster:
    """Adapters that a chain of pairs over the threshold connects; `representative` is the one with most pairs."""

    representative: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """An adapter that could not be compared."""

    name: str
    reason: str


@dataclass(frozen=True)
class HubSimilarReport(Tabular):
    """Pairs by magnitude of their cosine, in the order of names where it is the same.

    With `to`, every pair is of that adapter, which need not lie in the hub, and there are no clusters.
    `standard_error` is that of the estimates by which pairs were found, for adapters that have nothing in common; it is
    of no number in this report.
    """

    # Of rows(), in this order.
    columns: ClassVar[Mapping[str, Kind]] = {
        "adapter": "text",
        "other": "text",
        "relation": "text",
        "cosine": "number",
        "least_cosine": "number",
        "scale": "number",
        "shared": "integer",
        "only_in_adapter": "integer",
        "only_in_other": "integer",
        "same_bytes": "flag",
        "note": "text",
    }

    hub: str
    to: str | None
    threshold: float
    standard_error: float
    adapters: int  # that were compared
    pairs: tuple[Related, ...]
    merges: tuple[MergeFound, ...]
    clusters: tuple[Cluster, ...]
    left_out: tuple[LeftOut, ...]
    warnings: tuple[str, ...] = ()

    @property
    def counts(self) -> Mapping[str, int]:
        """How many pairs of each relation."""
        return Counter(pair.relation for pair in self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each pair; then one for each term of a merge, with its weight for the scale."""
        for pair in self.pairs:
            yield asdict(pair)
        for merge in self.merges:
            for term in merge.terms:
                yield {
                    **dict.fromkeys(self.columns),
                    "adapter": merge.adapter,
                    "other": term.name,
                    "relation": "merge",
                    "scale": term.weight,
                    "same_bytes": False,
                    "note": f"one of {len(merge.terms)} terms; relative error {merge.relative_error:.3g}",
                }
