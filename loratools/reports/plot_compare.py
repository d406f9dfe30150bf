"""The figure of a comparison: spectra of all fine-tunes, where each changed the model, and one map of overlaps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import AdapterError
from loratools.reports.plots import (
    SOFT,
    drawable,
    heat_map,
    limits_of,
    long,
    map_height,
    means_by_place,
    place_of,
    shorten,
    spectrum_axes,
    spread,
    write_figure,
)

if TYPE_CHECKING:
    from loratools.reports.compare import CompareReport, FineTune, OverlapMap

MAPS = 6  # fine-tunes with a heat map of their own
_COLOURS = ("#2f6db3", "#c2542f", "#1f8577", "#8a5aa3", "#a67a0a", "#b8437a", "#5d7a1f", "#50667a")
_DASHES = ("-", "--", ":", "-.")


def plot_compare(report: CompareReport, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write spectra, maps of relative norms and the first map of overlaps, as PNG or SVG by the suffix of `path`.

    Raises UsageError for another suffix, MissingExtraError without matplotlib, AdapterError where nothing was measured,
    and OutputError where the file exists and `force` is not given, or cannot be written.
    """
    place = place_of(path, force=force)
    if not any(value > 0 for tune in report.fine_tunes.values() for value in tune.spectrum):
        raise AdapterError("nothing to plot: no fine-tune differs from the base")
    return write_figure(place, lambda figure_class: _draw(figure_class, report))


def _draw(figure_class: Any, report: CompareReport) -> Any:
    layers = list(dict.fromkeys(t.layer for t in report.targets.values()))
    modules = list(dict.fromkeys(t.module for t in report.targets.values()))
    maps = {}
    for name in [*report.fine_tunes][:MAPS]:
        changed = [
            (t.layer, t.module, t.updates[name].relative_norm) for t in report.targets.values() if name in t.updates
        ]
        cells = means_by_place(changed, layers, modules)
        if not all(math.isnan(number) for row in cells for number in row):
            maps[name] = cells
    heights = [0.55, 3.1, *(map_height(layers, len(modules)) for _ in maps)]
    figure = figure_class(figsize=(10.5, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    _title(parts[0], report)
    overlap = next((m for m in report.overlap_maps if any(v is not None for row in m.values for v in row)), None)
    if overlap is None:
        _spectra(parts[1], report.fine_tunes)
    else:
        left, right = parts[1].subfigures(1, 2, width_ratios=(1.5, 1))
        _spectra(left, report.fine_tunes)
        _overlap(right, overlap)
    for part, (name, cells) in zip(parts[2:], maps.items(), strict=True):
        title = f"{shorten(name, 40)}: relative norm"
        heat_map(part, title, "GnBu", cells, layers, modules, limits_of(maps.values()))
    return figure


def _title(figure: Any, report: CompareReport) -> None:
    count = len(report.fine_tunes)
    many = "One fine-tune" if count == 1 else f"{count} fine-tunes"
    base = Path(report.base)
    name = base.parent.name if base.suffix and base.parent.name else base.name  # of the folder that the weights are in
    label = f"{many} of {shorten(name or report.base, 60)}"
    figure.text(0.012, 0.62, drawable(label), fontsize=14, fontweight="bold", va="center")
    facts = [f"{len(report.targets)} matrices"]
    if count > MAPS:
        facts.append(f"maps of the first {MAPS}")
    figure.text(0.012, 0.12, " · ".join(facts), fontsize=9, color=SOFT, va="center")


def _spectra(figure: Any, fine_tunes: Mapping[str, FineTune]) -> None:
    axis = figure.subplots()
    values = [value for tune in fine_tunes.values() for value in tune.spectrum if value > 0]
    for i, (name, tune) in enumerate(fine_tunes.items()):
        heights = [value if value > 0 else math.nan for value in tune.spectrum]
        axis.plot(
            range(1, len(heights) + 1),
            heights,
            label=drawable(shorten(name, 36)),
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=_DASHES[i % len(_DASHES)],
            marker="o" if len(heights) == 1 else None,
            lw=1.4,
        )
    spectrum_axes(axis, max(values), min(values), max(len(tune.spectrum) for tune in fine_tunes.values()))
    axis.set_title("Spectra, root mean square over the matrices")
    axis.set_xlabel("index of the singular value")
    axis.set_ylabel("singular value")
    axis.legend(loc="lower left", edgecolor="none", framealpha=0.85, fontsize=8 if len(fine_tunes) < 6 else 6.5)


def _overlap(figure: Any, overlap: OverlapMap) -> None:
    axis = figure.subplots()
    cells = [[math.nan if value is None else value for value in row] for row in overlap.values]
    image = axis.pcolormesh(cells, cmap="OrRd", vmin=0)
    axis.set_aspect("equal")
    axis.invert_yaxis()
    _layer_ticks(axis, overlap.layers)
    axis.set_title(drawable(f"Overlap, {shorten(overlap.module, 14)}, {overlap.side} side"))
    axis.set_ylabel(drawable(f"layer of {shorten(overlap.a, 24)}"))
    axis.set_xlabel(drawable(f"layer of {shorten(overlap.b, 24)}"))
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axis, pad=0.02, fraction=0.05, aspect=24)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)


def _layer_ticks(axis: Any, layers: Sequence[str]) -> None:
    shown = spread(len(layers), 8)
    names = [drawable(shorten(layers[i], 14)) for i in shown]
    slant: dict[str, Any] = {"rotation": 32, "ha": "right", "rotation_mode": "anchor"} if long(layers) else {}
    axis.set_xticks([i + 0.5 for i in shown], names, **slant)
    axis.set_yticks([i + 0.5 for i in shown], names)
    axis.tick_params(length=0)
