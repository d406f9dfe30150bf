"""What people read of an adapter in codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from loratools.reports.quantize import QuantizeReport, TargetCoded
from loratools_cli.grids import by_module, new_grid, some, texts
from loratools_cli.text import number, span


def render_quantize(report: QuantizeReport, *, everything: bool) -> Iterator[RenderableType]:
    """A row for each target, or for each module type, and one for all of them."""
    shown = new_grid("target", "rank", "codes", "rel. error")
    groups = {t: [c] for t, c in report.targets.items()} if everything else by_module(report.targets)
    for name, members in groups.items():
        shown.add_row(*texts(name if everything else f"{name} x{len(members)}", *_cells(members)))
    if report.targets:
        members = list(report.targets.values())
        error = report.total["relative_error"]
        total = "-" if error is None else number(error)
        shown.add_row(*texts(f"all {len(members)}", _ranks(members), "", total, style="bold"))
        yield shown
        yield Text(f"{report.total['bits_per_number']:.3g} bits of the file to a number of the input")


def _cells(members: Sequence[TargetCoded]) -> list[str]:
    codes = dict.fromkeys(c.coding for c in members)
    return [_ranks(members), ", ".join(codes), some((c.relative_error for c in members), number)]


def _ranks(members: Sequence[TargetCoded]) -> str:
    return f"{span(c.rank_before for c in members)} -> {span(c.rank_after for c in members)}"
