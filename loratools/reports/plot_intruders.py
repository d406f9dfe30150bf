"""The figure of intruders: how like the base's vector of the same index each leading singular vector has remained."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import AdapterError
from loratools.reports.plots import INK, SOFT, drawable, place_of, shorten, spread, write_figure

if TYPE_CHECKING:
    from loratools.reports.intruders import IntrudersReport, TargetIntruders

PANELS = 12  # module types with a panel of their own
_COLUMNS = 4
_MARK = "#c2542f"


def plot_intruders(report: IntrudersReport, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a map for each module type, layers down and singular vectors across, as PNG or SVG by the suffix of `path`.

    The colour is |cosine| of a left vector with the base's left vector of the same index; a dot marks an intruder, like
    none of any index. Raises UsageError for another suffix, MissingExtraError without matplotlib, AdapterError where no
    matrix was examined, and OutputError where the file exists and `force` is not given, or cannot be written.
    """
    place = place_of(path, force=force)
    if not report.targets:
        raise AdapterError("nothing to plot: no matrix was examined")
    return write_figure(place, lambda figure_class: _draw(figure_class, report))


def _draw(figure_class: Any, report: IntrudersReport) -> Any:
    modules = list(report.modules)[:PANELS]
    columns = min(_COLUMNS, len(modules))
    rows = -(-len(modules) // columns)
    order = {layer: i for i, layer in enumerate(report.layers)}
    targets = sorted(report.targets.values(), key=lambda t: order[t.layer])  # stable: otherwise as in the file
    panels = {m: [t for t in targets if t.module == m] for m in modules}
    tallest = max(len(of) for of in panels.values())
    height = 0.9 + min(4.2, max(0.5, 0.11 * tallest))
    figure = figure_class(figsize=(10.5, 0.75 + height * rows), layout="constrained")
    top, body = figure.subfigures(2, 1, height_ratios=(0.75, height * rows))
    total = report.total
    title = f"{total['left']} left intruders in {total['targets']} matrices"
    top.text(0.012, 0.66, drawable(title), fontsize=14, fontweight="bold", va="center")
    facts = f"first {report.top_k} singular vectors; dots: no cosine of {report.epsilon:g} with any of the base"
    top.text(0.012, 0.22, facts, color=SOFT, va="center")
    axes = body.subplots(rows, columns, squeeze=False)
    image = None
    for axis, module in zip(axes.flat, modules, strict=False):
        image = _panel(axis, module, panels[module], report.top_k)
    for axis in axes.flat[len(modules) :]:
        axis.set_visible(False)
    bar = body.colorbar(image, ax=axes, pad=0.01, fraction=0.02, aspect=24)
    bar.set_label("|cosine| with the vector of the same index")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return figure


def _panel(axis: Any, module: str, targets: Sequence[TargetIntruders], top_k: int) -> Any:
    cells = [[*t.left.matched_cosine, *(math.nan for _ in range(top_k - len(t.left.matched_cosine)))] for t in targets]
    image = axis.pcolormesh(cells, cmap="GnBu", vmin=0, vmax=1, edgecolors="white", linewidth=0.3)
    dots = [(index + 0.5, row + 0.5) for row, t in enumerate(targets) for index in t.left.indices]
    if dots:
        axis.plot(*zip(*dots, strict=True), ".", color=_MARK, markersize=4.5)
    axis.invert_yaxis()
    shown = spread(len(targets), 6)
    axis.set_yticks([i + 0.5 for i in shown], [drawable(shorten(targets[i].layer, 14)) for i in shown])
    places = spread(top_k, 6)
    axis.set_xticks([i + 0.5 for i in places], [f"{i + 1}" for i in places])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    count = sum(t.left.count for t in targets)
    axis.set_title(drawable(f"{shorten(module, 22)}: {count}"), color=INK)
    return image
