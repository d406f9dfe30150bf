"""Nonlinear bottlenecks as people read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeVar

from rich.console import RenderableType
from rich.text import Text

from loratools.reports.info import BottleneckInfo
from loratools.reports.neurons import NeuronsReport, NeuronsTarget
from loratools.reports.prune_neurons import PrunedTarget, PruneNeuronsReport
from loratools_cli.grids import new_grid, some, texts
from loratools_cli.text import counted, number, plain, span

_LISTED = 24  # bottlenecks

Row = TypeVar("Row")


def bottlenecks_line(found: Mapping[str, BottleneckInfo]) -> str:
    """What the bottlenecks of a file are, in one line; nothing for a file without any."""
    if not found:
        return ""
    rows = list(found.values())
    few = 4
    kinds, activations = (
        counted(Counter(values), few)
        for values in ((r.kind for r in rows), (r.activation or "an activation that is not stated" for r in rows))
    )
    shape = f"{span(r.inputs for r in rows)} -> {span(r.width for r in rows)} units"
    return (
        f"{len(rows)} of {kinds}: {shape}, {activations}, {sum(r.parameters for r in rows):,} parameters; "
        "h + scale * up(act(down h)), no update of a weight"
    )


def render_neurons(report: NeuronsReport, *, everything: bool) -> Iterator[RenderableType]:
    """What the bottlenecks are, then a row for each."""
    first = next(iter(report.targets.values()))
    widths = span(t.width for t in report.targets.values())
    yield Text(
        f"{plain(first.kind)}: {len(report.targets)} bottlenecks of {widths} units, {first.activation}, "
        f"{report.parameters:,} parameters; no update of a weight"
    )
    over = "the activations" if report.linearised == "activations" else "a standard normal z, which is an assumption"
    yield Text(f"linearised: J = scale * up diag(E act'(z)) down, over {over}", style="dim")
    rows = new_grid("bottleneck", "units", "removable", "|J|", "stable rank", "99 %", "largest")
    for name, t in _first(report.targets, everything).items():
        rows.add_row(*texts(name, *_cells(t)))
    yield rows
    if everything:
        for name, t in report.targets.items():
            yield Text(f"{plain(name)}: {' '.join(map(number, t.singular_values))}")
    yield from _more(report.targets, everything)


def render_prune_neurons(report: PruneNeuronsReport, *, everything: bool) -> Iterator[RenderableType]:
    """A row for each bottleneck, and what is meant by the errors."""
    rows = new_grid("bottleneck", "units", "exactly", "rel. error", "held out")
    for name, t in _first(report.targets, everything).items():
        gone = t.duplicates + t.constant + t.zero
        rows.add_row(
            *texts(name, f"{t.width_before} -> {t.width_after}", str(gone), number(t.error), number(t.held_out_error))
        )
    if len(report.targets) > 1:
        rows.add_row(*texts(f"all {len(report.targets)}", *_totals(list(report.targets.values())), style="bold"))
    yield rows
    yield from _more(report.targets, everything)
    if report.tokens:
        held = f", and on {report.held_out_tokens} held out" if report.held_out_tokens else ""
        yield Text(f"errors of what is added, as stored, on {report.tokens} tokens{held}")


def _totals(rows: list[PrunedTarget]) -> list[str]:
    return [
        f"{span(t.width_before for t in rows)} -> {span(t.width_after for t in rows)}",
        str(sum(t.duplicates + t.constant + t.zero for t in rows)),
        some((t.error for t in rows), number),
        some((t.held_out_error for t in rows), number),
    ]


def _cells(t: NeuronsTarget) -> list[str]:
    return [
        str(t.width),
        str(t.constant + t.duplicates + t.zero),
        number(t.norm),
        number(t.stable_rank),
        str(t.rank_99),
        number(t.singular_values[0]),
    ]


def _first(rows: Mapping[str, Row], everything: bool) -> dict[str, Row]:
    return dict(list(rows.items())[: None if everything else _LISTED])


def _more(rows: Mapping[str, Row], everything: bool) -> Iterator[RenderableType]:
    if not everything and len(rows) > _LISTED:
        yield Text(f"... and {len(rows) - _LISTED} more; see --all")
