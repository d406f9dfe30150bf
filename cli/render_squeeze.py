"""What a squeeze changed, as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType

from loratools.reports.squeeze import SqueezeReport, TargetChange
from loratools.sizes import format_size
from loratools_cli.grids import by_module, new_grid, texts
from loratools_cli.text import number, percent, sizes, span


def render_squeeze(report: SqueezeReport, *, everything: bool) -> Iterator[RenderableType]:
    """A row for each target, or each kind of module, and the sums."""
    changes = report.targets
    weighted = [] if report.weighted_error is None else [number(report.weighted_error)]
    titles = ("target", "rank", "energy kept %", "rel. error", *("weighted" for _ in weighted), "size")
    if weighted:  # which leaves no room for more than 80 columns have
        titles = ("target", "rank", "kept %", "error", "weighted", "new size")
    shown_rows = new_grid(*titles)
    if everything:
        for target, change in changes.items():
            shown_rows.add_row(*texts(target, *_change_cells([change])))
    else:
        for module, members in by_module(changes).items():
            shown_rows.add_row(*texts(f"{module} x{len(members)}", *_change_cells(members)))
    if changes:
        total = report.total
        cells = [percent(total["energy_kept"]), number(total["relative_error"]), *weighted]
        cells.append(_size(list(changes.values()), after_alone=bool(weighted)))
        shown_rows.add_row(*texts(f"all {len(changes)}", _ranks(list(changes.values())), *cells, style="bold"))
        yield shown_rows


def _change_cells(changes: Sequence[TargetChange]) -> list[str]:
    weighted = [c.weighted_error for c in changes if c.weighted_error is not None]
    return [
        _ranks(changes),
        span((c.energy_kept for c in changes), percent),
        span((c.relative_error for c in changes), number),
        *([span(weighted, number)] if weighted else []),
        _size(changes, after_alone=bool(weighted)),
    ]


def _size(changes: Sequence[TargetChange], *, after_alone: bool) -> str:
    after = sum(c.bytes_after for c in changes)
    return format_size(after) if after_alone else sizes(sum(c.bytes_before for c in changes), after)


def _ranks(changes: Sequence[TargetChange]) -> str:
    return f"{span(c.rank_before for c in changes)} -> {span(c.rank_after for c in changes)}"
