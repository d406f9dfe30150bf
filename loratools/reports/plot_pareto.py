"""The figure of bytes against error: a line for each method, what no other beats in front."""

from __future__ import annotations

import os
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import AdapterError
from loratools.reports.pareto import Point
from loratools.reports.plots import FAINT, SOFT, place_of, write_figure
from loratools.sizes import format_size

if TYPE_CHECKING:
    from loratools.reports.pareto import ParetoReport

_COLOURS = (
    "#c2542f",
    "#22303c",
    "#2f7f86",
    "#8a5fa8",
    "#b58a1b",
    "#4c7bb5",
    "#6b8f3c",
    "#a3475f",
    "#777777",
    "#3d6b58",
    "#d8894a",
    "#5a6b8c",
    "#94663c",
)


def plot_pareto(report: ParetoReport, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write error against bytes, both logarithmic, as PNG or SVG by the suffix of `path`; as inputs see it, if known.

    A line is the best that its method does at each size. Raises UsageError for another suffix, MissingExtraError
    without matplotlib, AdapterError without points, and OutputError where the file exists and `force` is not given.
    """
    place = place_of(path, force=force)
    if not report.points:
        raise AdapterError("nothing to plot: there are no points")
    return write_figure(place, lambda figure_class: _draw(figure_class, report))


def _draw(figure_class: Any, report: ParetoReport) -> Any:
    figure = figure_class(figsize=(8.2, 5.4), layout="constrained")
    axis = figure.subplots()
    methods = list(dict.fromkeys(p.method for p in report.points))
    methods.sort(key=lambda m: (not m.startswith("grid"), not m.startswith("svd"), m))
    for colour, method in zip(cycle(_COLOURS), methods, strict=False):
        points = [(p.bytes, _error(p, weighted=report.is_weighted)) for p in report.points if p.method == method]
        front = _front(points)
        width = 2.2 if method.startswith("grid") else 1.2
        axis.plot(*zip(*points, strict=True), ".", color=colour, markersize=4, alpha=0.5)
        axis.plot(*zip(*front, strict=True), color=colour, linewidth=width, label=method)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("bytes of the file")
    axis.set_ylabel("error as the inputs see it" if report.is_weighted else "relative error of the delta")
    axis.grid(visible=True)
    axis.axvline(report.bytes, color=FAINT, linewidth=0.8, linestyle=":")
    axis.xaxis.set_major_formatter(lambda x, _: format_size(int(x)))
    axis.legend(frameon=False, ncols=2)
    axis.set_title("What each method makes of the adapter, and what it loses")
    axis.text(
        0.995, 1.01, f"dotted: as it is, {format_size(report.bytes)}", transform=axis.transAxes, ha="right", color=SOFT
    )
    return figure


def _error(point: Point, *, weighted: bool) -> float:
    return point.weighted_error if weighted and point.weighted_error is not None else point.relative_error


def _front(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points of one method that no other of it beats, by size."""
    out: list[tuple[int, float]] = []
    for size, error in sorted(points):
        if not out or error < out[-1][1]:
            out.append((size, error))
    return out
