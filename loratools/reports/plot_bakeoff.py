"""The figure of families at equal bytes: error against the size of the file, before the low-rank optimum."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import AdapterError
from loratools.reports.plots import FAINT, place_of, write_figure
from loratools.sizes import format_size

if TYPE_CHECKING:
    from loratools.reports.bakeoff import BakeoffReport

_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "*")


def plot_bakeoff(report: BakeoffReport, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write relative error against bytes, the latter logarithmic, as PNG or SVG by the suffix of `path`.

    Raises UsageError for another suffix, MissingExtraError without matplotlib, AdapterError without entrants, and
    OutputError where the file exists and `force` is not given.
    """
    place = place_of(path, force=force)
    if not report.entrants:
        raise AdapterError("nothing to plot: no family took part")
    return write_figure(place, lambda figure_class: _draw(figure_class, report))


def _draw(figure_class: Any, report: BakeoffReport) -> Any:
    figure = figure_class(figsize=(8.6, 5.6), layout="constrained")
    axis = figure.subplots()
    least = {f: min(e.relative_error for e in report.entrants if e.family == f) for f in _families(report)}
    for index, family in enumerate(sorted(least, key=lambda f: least[f])):
        points = sorted((e.bytes, e.relative_error) for e in report.entrants if e.family == family)
        marker = _MARKERS[index % len(_MARKERS)]
        axis.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.1, label=family)
    sizes = [e.bytes for e in report.entrants]
    curve = [(size, error) for size, error in report.reference if size <= 2 * max(sizes)]
    if curve:
        axis.plot(*zip(*curve, strict=True), color=FAINT, linewidth=2.5, alpha=0.6, label="low-rank optimum")
    axis.set_xscale("log")
    axis.set_xlim(min(sizes) / 1.2, max(sizes) * 1.2)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel(f"bytes of a file of {len(report.targets)} targets")
    axis.set_ylabel("relative error of the deltas")
    axis.grid(visible=True)
    for formatter in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        formatter(lambda x, _: format_size(int(x)))
    axis.legend(frameon=False, ncols=2)
    axis.set_title("What each family keeps of the same deltas")
    return figure


def _families(report: BakeoffReport) -> list[str]:
    return list(dict.fromkeys(e.family for e in report.entrants))
