"""The figure of families at equal bytes: error against the size of the file, before the low-rank optimum."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import AdapterError
from loratools.reports.plots import FAINT, place_of, write_figure
from loratools.sizes import format_size

if TYPE_CHECKING:
    from loratools.reports.bakeoff import BakeoffReport

_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "*")
_LINES = ("-", "--", ":")  # each for as many families as there are colours
_APART = 1.3  # ratio of sizes below which their labels would overlap


def plot_bakeoff(report: BakeoffReport, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write relative error against bytes, the latter logarithmic, as PNG or SVG by the suffix of `path`.

    Raises UsageError for another suffix, MissingExtraError without matplotlib, AdapterError without entrants, and
    OutputError where the file exists and `force` is not given.
    """
    return plot_bakeoffs({"What each family keeps of the same deltas": report}, path, force=force)


def plot_bakeoffs(reports: Mapping[str, BakeoffReport], path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """As `plot_bakeoff`, with a panel for each report under its title; a family looks alike in all of them."""
    place = place_of(path, force=force)
    if not all(report.entrants for report in reports.values()):
        raise AdapterError("nothing to plot: no family took part")
    return write_figure(place, lambda figure_class: _draw(figure_class, reports))


def _draw(figure_class: Any, reports: Mapping[str, BakeoffReport]) -> Any:
    figure = figure_class(figsize=(3.0 + (5.6 if len(reports) == 1 else 3.6 * len(reports)), 5.6), layout="constrained")
    axes = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    families = _families(reports)
    lines: dict[str, Any] = {}
    for axis, (title, report) in zip(axes, reports.items(), strict=True):
        for index, family in enumerate(families):
            points = sorted((e.bytes, e.relative_error) for e in report.entrants if e.family == family)
            if points:
                look = {"color": f"C{index % 10}", "linestyle": _LINES[index // 10 % 3], "marker": _MARKERS[index % 10]}
                lines[family] = axis.plot(*zip(*points, strict=True), markersize=4, linewidth=1.1, **look)[0]
        sizes = [e.bytes for e in report.entrants]
        curve = [(size, error) for size, error in report.reference if size <= 2 * max(sizes)]
        if curve:
            best = axis.plot(*zip(*curve, strict=True), color=FAINT, linewidth=2.5, alpha=0.6, zorder=1)[0]
            lines["low-rank optimum"] = best
        _framed(axis, report, title)
    axes[0].set_ylabel("relative error of the deltas")
    in_order = [name for name in (*families, "low-rank optimum") if name in lines]
    figure.legend([lines[name] for name in in_order], in_order, loc="outside right center", frameon=False)
    return figure


def _framed(axis: Any, report: BakeoffReport, title: str) -> None:
    budgets = sorted({e.budget for e in report.entrants})
    sizes = [*(e.bytes for e in report.entrants), *budgets]
    axis.set_xscale("log")
    axis.set_xlim(min(sizes) / 1.2, max(sizes) * 1.2)
    axis.set_ylim(0, 1.02)
    ticks: list[int] = []
    for budget in budgets:
        if not ticks or budget > _APART * ticks[-1]:
            ticks.append(budget)
    axis.set_xticks(ticks, [format_size(budget) for budget in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(f"bytes of a file of {len(report.targets)} targets")
    axis.grid(visible=True)
    axis.set_title(title)


def _families(reports: Mapping[str, BakeoffReport]) -> list[str]:
    """By the least error in any report."""
    least: dict[str, float] = {}
    for entrant in (e for report in reports.values() for e in report.entrants):
        least[entrant.family] = min(entrant.relative_error, least.get(entrant.family, entrant.relative_error))
    return sorted(least, key=lambda family: least[family])
