"""The figure of an inspection: spectra of all targets, and maps of layer by module type."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import AdapterError
from loratools.reports.plots import (
    FAINT,
    SOFT,
    drawable,
    heat_map,
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
    from loratools.reports.inspect import InspectReport, TargetNumbers

PANELS = 8  # module types with a panel of their own
COLUMNS = 4


def plot_spectra(report: InspectReport, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the spectra of all targets and maps of layer by module type, as PNG or SVG by the suffix of `path`.

    Raises UsageError for another suffix, MissingExtraError without matplotlib, AdapterError where nothing was measured,
    and OutputError where the file exists and `force` is not given, or cannot be written.
    """
    place = place_of(path, force=force)
    if not any(t.spectral_norm > 0 for t in report.targets.values()):
        raise AdapterError("nothing to plot: no measured target differs from zero")
    return write_figure(place, lambda figure_class: _draw(figure_class, report))


def _draw(figure_class: Any, report: InspectReport) -> Any:
    moving = {name: t for name, t in report.targets.items() if t.spectral_norm > 0}
    panels = _panels(moving)
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    maps: list[tuple[str, str, Callable[[TargetNumbers], float | None]]] = [
        ("Effective rank", "GnBu", lambda t: t.effective_rank)
    ]
    if any(t.relative_norm is not None for t in moving.values()):
        maps.append(("Norm relative to the base weight", "OrRd", lambda t: t.relative_norm))
    modules = list(dict.fromkeys(t.module for t in moving.values()))
    layers = [layer for layer in report.layers if any(t.layer == layer for t in moving.values())]
    heights = [0.55, 1.75 * rows + 0.35, *(map_height(layers, len(modules)) for _ in maps)]
    figure = figure_class(figsize=(10.5, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    _title(parts[0], report)
    _spectra(parts[1], panels, layers, rows, columns)
    for part, (title, colours, value) in zip(parts[2:], maps, strict=True):
        numbers = ((t.layer, t.module, value(t)) for t in moving.values())
        heat_map(part, title, colours, means_by_place(numbers, layers, modules), layers, modules)
    return figure


def _title(figure: Any, report: InspectReport) -> None:
    total = report.total
    name = Path(report.path or "adapter")
    label = name.parent.name if name.stem == "adapter_model" else name.name
    ranks = (
        f"rank {total.rank_max}" if total.rank_min == total.rank_max else f"ranks {total.rank_min} to {total.rank_max}"
    )
    families = ", ".join(report.families)
    figure.text(0.012, 0.62, drawable(label), fontsize=14, fontweight="bold", va="center")
    mean = f"mean effective rank {total.mean_effective_rank:.1f}"
    facts = drawable(" · ".join([report.format, families, f"{total.targets} targets", ranks, mean]))
    figure.text(0.012, 0.12, facts, fontsize=9, color=SOFT, va="center")


def _panels(targets: Mapping[str, TargetNumbers]) -> dict[str, list[TargetNumbers]]:
    """Targets by module type, in the order of the file; the rarest types share the last panel."""
    panels: dict[str, list[TargetNumbers]] = {}
    for target in targets.values():
        panels.setdefault(target.module, []).append(target)
    if len(panels) <= PANELS:
        return panels
    kept = set(sorted(panels, key=lambda module: -len(panels[module]))[: PANELS - 1])
    rest = {module: members for module, members in panels.items() if module not in kept}
    shared = [target for members in rest.values() for target in members]
    return {m: panels[m] for m in panels if m in kept} | {f"{len(rest)} other types": shared}


def _spectra(
    figure: Any, panels: Mapping[str, list[TargetNumbers]], layers: Sequence[str], rows: int, columns: int
) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    # The pale end of viridis is unreadable on white.
    shades = ListedColormap([colormaps["viridis"](0.92 * i / 255) for i in range(256)])
    depth = {layer: i for i, layer in enumerate(layers)}
    scale = Normalize(0, max(1, len(layers) - 1))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    top = max(t.spectral_norm for members in panels.values() for t in members)
    least = min((s for members in panels.values() for t in members for s in t.spectrum if s > 0), default=top)
    longest = max(len(t.spectrum) for members in panels.values() for t in members)
    for i, (axis, (module, members)) in enumerate(zip(axes, panels.items(), strict=False)):
        for target in members:
            values = [s if s > 0 else math.nan for s in target.spectrum]
            marker = "o" if len(values) == 1 else None
            colour = shades(scale(depth[target.layer]))
            axis.plot(range(1, len(values) + 1), values, lw=0.9, alpha=0.75, color=colour, marker=marker, ms=3)
        spectrum_axes(axis, top, least, longest)
        axis.tick_params(labelbottom=i + columns >= len(panels))
        axis.set_title(drawable(shorten(module, 24)))
        axis.text(1, 1.02, f"×{len(members)}", transform=axis.transAxes, ha="right", va="bottom", color=FAINT)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supylabel("singular value", fontsize=9)
    figure.supxlabel("index of the singular value", fontsize=9)
    if len(layers) > 1:
        bar = figure.colorbar(ScalarMappable(scale, shades), ax=axes, pad=0.012, fraction=0.022, aspect=34)
        shown = spread(len(layers), 7)
        names = [drawable(shorten(layers[i], 18)) for i in shown]
        bar.set_ticks(shown, labels=names if long(layers) else [f"layer {names[0]}", *names[1:]])
        bar.ax.tick_params(length=0)
        bar.ax.invert_yaxis()
        bar.outline.set_visible(False)
