"""What became of an adapter that was carried over by weights alone, as people read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import RenderableType

from loratools.reports.weight_transfer import CarriedTarget, WeightTransferReport
from loratools_cli.grids import by_module, new_grid, reasons, some, texts
from loratools_cli.text import number, percent, span


def render_weight_transfer(report: WeightTransferReport, *, everything: bool) -> Iterator[RenderableType]:
    """A row for each target, or each kind of module: how it came there, how much of it, and how large it is."""
    shown = new_grid("target", "by", "agreement", "kept %", "relative size %")
    groups = {t: [row] for t, row in report.targets.items()} if everything else by_module(report.targets)
    for name, members in groups.items():
        shown.add_row(*texts(name if everything else f"{name} x{len(members)}", *_cells(members)))
    yield shown
    yield from reasons("left out", report.dropped, everything)


def _cells(members: Sequence[CarriedTarget]) -> list[str]:
    return [
        ", ".join(dict.fromkeys(row.method for row in members)),
        some((row.agreement for row in members), number),
        span((row.kept for row in members), percent),
        f"{_hundredths(r.relative_before for r in members)} -> {_hundredths(r.relative_after for r in members)}",
    ]


def _hundredths(shares: Iterable[float]) -> str:
    return span((100 * share for share in shares), number)
