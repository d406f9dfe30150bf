"""An adapter between a pruned and a full model, as people read it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from loratools.reports.resize import ResizedTarget, ResizeReport
from loratools_cli.grids import by_module, new_grid, texts
from loratools_cli.text import percent, span


def render_resize(report: ResizeReport, *, everything: bool) -> Iterator[RenderableType]:
    """A row for each target, or for each module type, and one for all of them."""
    shown = new_grid("target", "outputs", "inputs", "dropped %")
    groups = {t: [row] for t, row in report.targets.items()} if everything else by_module(report.targets)
    for name, members in groups.items():
        shown.add_row(*texts(name if everything else f"{name} x{len(members)}", *_cells(members)))
    left = f", {report.unchanged} left alone" if report.unchanged else ""
    shown.add_row(*texts(f"all {len(report.targets)}{left}", "", "", percent(report.dropped), style="bold"))
    yield shown


def _cells(members: list[ResizedTarget]) -> list[str]:
    return [
        _changes([row.outputs for row in members]),
        _changes([row.inputs for row in members]),
        span((row.dropped for row in members), percent),
    ]


def _changes(sides: list[tuple[int, int]]) -> str:
    kinds = dict.fromkeys(sides)
    before, after = next(iter(kinds))
    shown = str(after) if before == after else f"{before} -> {after}"
    return shown if len(kinds) == 1 else f"{shown} and {len(kinds) - 1} others"
