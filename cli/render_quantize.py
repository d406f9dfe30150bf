"""What people read of an adapter in codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from loratools.reports.pareto import ParetoReport
from loratools.reports.quantize import QuantizeReport, TargetCoded
from loratools.sizes import format_size
from loratools_cli.grids import by_module, new_grid, some, texts
from loratools_cli.text import number, percent, span


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
        if (weighted := report.total["weighted_error"]) is not None:
            yield Text(f"{number(weighted)} is the error as the inputs see it")


def _cells(members: Sequence[TargetCoded]) -> list[str]:
    codes = dict.fromkeys(c.coding for c in members)
    return [_ranks(members), ", ".join(codes), some((c.relative_error for c in members), number)]


def _ranks(members: Sequence[TargetCoded]) -> str:
    return f"{span(c.rank_before for c in members)} -> {span(c.rank_after for c in members)}"


def render_pareto(report: ParetoReport, *, everything: bool) -> Iterator[RenderableType]:
    """The points that no other beats, or all of them, with the commands that make them."""
    weighted, matched = report.is_weighted, any(e.exact_match is not None for e in report.evaluated.values())
    tasks = ["NLL", *(["match %"] if matched else [])] if report.evaluated else []
    more = ["as inputs see it"] if weighted else []
    shown = new_grid("method", "setting", "size", "share %", "rel. error", *more, *tasks, *([""] if everything else []))
    for name, found in report.evaluated.items():
        size = ["", ""] if name == "base" else [format_size(report.bytes), percent(1.0)]
        cells = ["", *size, "", *([""] if weighted else []), *_task(found.nll, found.exact_match, matched=matched)]
        shown.add_row(*texts(name, *cells, *([""] if everything else [])))
    points = report.points if everything else [p for p in report.points if p.best]
    for point in points:
        share = percent(point.bytes / report.bytes) if report.bytes else ""
        cells = [point.setting, format_size(point.bytes), share, number(point.relative_error)]
        cells += [number(point.weighted_error)] if weighted else []
        cells += _task(point.nll, point.exact_match, matched=matched) if tasks else []
        shown.add_row(*texts(point.method, *cells, *(["best" if point.best else ""] if everything else [])))
    yield shown
    if not everything:
        yield Text(f"{len(report.points) - len(points)} other settings are beaten by these; see --all")
    for command in dict.fromkeys(p.command for p in points if p.best):
        yield Text(f"  {command}")


def _task(nll: float | None, match: float | None, *, matched: bool) -> list[str]:
    """The cells of a task; empty for what was not evaluated."""
    return ["" if nll is None else f"{nll:.4f}", *(["" if match is None else percent(match)] if matched else [])]
