"""How people read which adapters of a hub are alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loratools.reports.hub_similar import Cluster, HubSimilarReport, MergeFound, Related
from loratools_cli.grids import reasons, texts
from loratools_cli.text import counted_things, number, plain, shortened

_SHOWN = 40  # rows of a kind, unless all are asked for
_MEMBERS = 6  # of a cluster
_NAME = 60  # characters of a name in a line of text

T = TypeVar("T")


def render_hub_similar(report: HubSimilarReport, *, everything: bool) -> Iterator[RenderableType]:
    """Pairs, merges and clusters, then what was left out, and how many of each there are."""
    if report.pairs:
        yield _pairs(report.pairs if everything else report.pairs[:_SHOWN], named=report.to is None)
        yield from _more(report.pairs, everything)
    noted = {f"{p.adapter} and {p.other}": p.note for p in report.pairs if p.note and "copy" in p.relation}
    yield from reasons("copies but for other tensors", noted, everything)
    if report.merges:
        yield Text("merges", style="bold")
        yield from (_merge(merge) for merge in (report.merges if everything else report.merges[:_SHOWN]))
        yield from _more(report.merges, everything)
    if report.clusters:
        yield Text("clusters", style="bold")
        yield from (_cluster(c, everything) for c in (report.clusters if everything else report.clusters[:_SHOWN]))
        yield from _more(report.clusters, everything)
    yield from reasons("left out", {row.name: row.reason for row in report.left_out}, everything)
    yield Text(_sum(report), style="bold")


def _pairs(pairs: Sequence[Related], *, named: bool) -> Table:
    """A row for each pair; the first name goes without saying where all have the same."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("adapter", "other")[not named :]:
        shown.add_column(title, overflow="fold")
    shown.add_column("", no_wrap=True)
    for title in ("cosine", "least"):
        shown.add_column(title, justify="right", no_wrap=True)
    for pair in pairs:
        names = (pair.adapter, pair.other)[not named :]
        shown.add_row(*texts(*names, _relation(pair), _cosine(pair.cosine), _cosine(pair.least_cosine)))
    return shown


def _relation(pair: Related) -> str:
    if pair.relation == "scaled copy" and pair.scale is not None:
        return f"scaled copy (x{number(pair.scale)})"
    return "copy, same bytes" if pair.relation == "copy" and pair.same_bytes else pair.relation


def _cosine(value: float | None) -> str:
    """Four digits after the point; more where they would say 1 of what is not, within rounding."""
    if value is None:
        return "-"
    off = 1 - abs(value)
    return f"{value:.4f}" if off < 1e-9 or off >= 5e-5 else f"{value:.9f}".rstrip("0")


def _merge(merge: MergeFound) -> Text:
    terms = " + ".join(f"{number(term.weight)} x {shortened(term.name, _NAME)}" for term in merge.terms)
    return Text(f"  {plain(merge.adapter)} = {terms}, relative error {number(merge.relative_error)}")


def _cluster(cluster: Cluster, everything: bool) -> Text:
    others = [name for name in cluster.members if name != cluster.representative]
    named = others if everything else others[:_MEMBERS]
    more = f" and {len(others) - len(named)} more" if len(named) < len(others) else ""
    listed = ", ".join(plain(name) if everything else shortened(name, _NAME) for name in named)
    return Text(f"  {plain(cluster.representative)}: {len(cluster.members)}, with {listed}{more}")


def _more(rows: Sequence[T], everything: bool) -> Iterator[Text]:
    if len(rows) > _SHOWN and not everything:
        yield Text(f"... and {len(rows) - _SHOWN} more; see --all")


def _sum(report: HubSimilarReport) -> str:
    adapters = counted_things(report.adapters, "adapter")
    if report.to is not None:
        return f"{adapters} compared with {plain(report.to)}"
    counts = report.counts
    said = [
        counted_things(counts["copy"], "copy", "copies"),
        counted_things(counts["scaled copy"], "scaled copy", "scaled copies"),
        counted_things(counts["derivative"], "derivative"),
        counted_things(len(report.merges), "merge"),
        counted_things(len(report.clusters), "cluster"),
    ]
    there = [text for text in said if not text.startswith("0 ")]
    return f"{adapters}: {', '.join(there) or f'none alike to a cosine of {report.threshold:g}'}"
