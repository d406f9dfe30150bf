"""What statistics of activations were made of, as people read it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from loratools.reports.calibrate import CalibratedTarget, CalibrateReport
from loratools_cli.grids import by_module, new_grid, texts
from loratools_cli.text import number, span


def render_calibrate(report: CalibrateReport, *, everything: bool) -> Iterator[RenderableType]:
    """A row for each target, or each kind of module."""
    rows = new_grid("target", "rank", "inputs", "energy", "effective rank")
    groups = {target: [row] for target, row in report.targets.items()}
    if not everything:
        groups = {f"{module} x{len(members)}": members for module, members in by_module(report.targets).items()}
    for name, members in groups.items():
        rows.add_row(*texts(name, *_cells(members)))
    yield rows


def _cells(members: list[CalibratedTarget]) -> list[str]:
    return [
        span(row.rank for row in members),
        span(row.inputs for row in members),
        span((row.energy for row in members), number),
        span((row.effective_rank for row in members), number),
    ]
