"""Figures of reports: the only file that knows matplotlib."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import AdapterError, MissingExtraError, UsageError
from loratools.storage.atomic import AtomicFile, printable, refuse_existing

if TYPE_CHECKING:
    from loratools.reports.inspect import InspectReport, TargetNumbers

SUFFIXES = (".png", ".svg")
PANELS = 8  # module types with a panel of their own
COLUMNS = 4
_DECADES = 5  # of singular values shown below the largest
_INK, _FAINT, _EMPTY = "#22303c", "#8a97a3", "#eef1f4"
_STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.minor.visible": False,
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.6,
    "svg.hashsalt": "loratools",  # the same figure gives the same bytes
    "path.simplify": False,
}


def plot_spectra(report: InspectReport, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the spectra of all targets and maps of layer by module type, as PNG or SVG by the suffix of `path`.

    Raises UsageError for another suffix, MissingExtraError without matplotlib, AdapterError where nothing was measured,
    and OutputError where the file exists and `force` is not given, or cannot be written.
    """
    place = Path(path)
    if place.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{printable(place)}: a plot is written as {' or '.join(SUFFIXES)}; choose one of these suffixes"
        )
    refuse_existing(place, force=force)
    if not any(t.spectral_norm > 0 for t in report.targets.values()):
        raise AdapterError("nothing to plot: no measured target differs from zero")
    data = _render(report, place.suffix.lower()[1:])
    file = AtomicFile(place)
    try:
        file.write_at(0, data)
        file.commit(len(data))
    finally:
        file.abort()
    return place


def _render(report: InspectReport, kind: str) -> bytes:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'loratools[plot]'") from error
    metadata: dict[str, Any] = {"svg": {"Date": None, "Creator": "loratools"}, "png": {"Software": "loratools"}}
    buffer = io.BytesIO()
    style: Any = dict(_STYLE)
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        _draw(Figure, report).savefig(buffer, format=kind, dpi=160, facecolor="white", metadata=metadata[kind])
    return _numbered(buffer.getvalue()) if kind == "svg" else buffer.getvalue()


def _numbered(svg: bytes) -> bytes:
    """`svg` with its generated ids numbered: matplotlib hashes memory addresses into those of clip paths."""
    ids = dict.fromkeys(re.findall(rb'id="([a-z][0-9a-f]{10})"', svg))
    numbers = {name: b"%c%d" % (name[0], index) for index, name in enumerate(ids)}
    return re.sub(rb"(?<=[\"#])[a-z][0-9a-f]{10}(?=[\")])", lambda m: numbers.get(m[0], m[0]), svg)


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
    map_height = 0.75 + 0.21 * max(2, len(modules)) + (0.55 if _long(layers) else 0.0)
    heights = [0.55, 1.75 * rows + 0.35, *(map_height for _ in maps)]
    figure = figure_class(figsize=(10.5, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    _title(parts[0], report)
    _spectra(parts[1], panels, layers, rows, columns)
    for part, (title, colours, value) in zip(parts[2:], maps, strict=True):
        _heat_map(part, title, colours, _cells(moving, layers, modules, value), layers, modules)
    return figure


def _title(figure: Any, report: InspectReport) -> None:
    total = report.total
    name = Path(report.path or "adapter")
    label = name.parent.name if name.stem == "adapter_model" else name.name
    ranks = (
        f"rank {total.rank_max}" if total.rank_min == total.rank_max else f"ranks {total.rank_min} to {total.rank_max}"
    )
    families = ", ".join(report.families)
    figure.text(0.012, 0.62, _text(label), fontsize=14, fontweight="bold", va="center")
    mean = f"mean effective rank {total.mean_effective_rank:.1f}"
    facts = _text(" · ".join([report.format, families, f"{total.targets} targets", ranks, mean]))
    figure.text(0.012, 0.12, facts, fontsize=9, color="#5b6975", va="center")


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
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

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
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_ylim(max(least, top * 10**-_DECADES) * 0.7, top * 1.5)
        axis.set_xlim(0.93, max(2, longest) * 1.08)
        axis.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        if math.log10(top / least) > 1:  # with less than a decade, the minor ticks are the ones that tell
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(length=2.5, which="both")
        axis.tick_params(labelbottom=i + columns >= len(panels))
        axis.grid(True, which="major")
        axis.set_axisbelow(True)
        axis.set_title(_text(_shorten(module, 24)))
        axis.text(1, 1.02, f"×{len(members)}", transform=axis.transAxes, ha="right", va="bottom", color=_FAINT)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supylabel("singular value", fontsize=9)
    figure.supxlabel("index of the singular value", fontsize=9)
    if len(layers) > 1:
        bar = figure.colorbar(ScalarMappable(scale, shades), ax=axes, pad=0.012, fraction=0.022, aspect=34)
        shown = _spread(len(layers), 7)
        names = [_text(_shorten(layers[i], 18)) for i in shown]
        bar.set_ticks(shown, labels=names if _long(layers) else [f"layer {names[0]}", *names[1:]])
        bar.ax.tick_params(length=0)
        bar.ax.invert_yaxis()
        bar.outline.set_visible(False)


def _cells(
    targets: Mapping[str, TargetNumbers],
    layers: Sequence[str],
    modules: Sequence[str],
    value: Callable[[TargetNumbers], float | None],
) -> list[list[float]]:
    """Means by module (rows) and layer (columns), NaN where there is no such target."""
    found: dict[tuple[str, str], list[float]] = {}
    for target in targets.values():
        if (number := value(target)) is not None:
            found.setdefault((target.module, target.layer), []).append(number)
    means = {place: math.fsum(numbers) / len(numbers) for place, numbers in found.items()}
    return [[means.get((module, layer), math.nan) for layer in layers] for module in modules]


def _heat_map(
    figure: Any, title: str, colours: str, cells: list[list[float]], layers: Sequence[str], modules: Sequence[str]
) -> None:
    axis = figure.subplots()
    known = [number for row in cells for number in row if not math.isnan(number)]
    low, high = min(known), max(known)
    image = axis.pcolormesh(
        cells, cmap=colours, vmin=low - 0.15 * (high - low), vmax=high, edgecolors="white", linewidth=1.1
    )
    axis.set_facecolor(_EMPTY)
    axis.invert_yaxis()
    axis.set_yticks([i + 0.5 for i in range(len(modules))], [_text(_shorten(module, 24)) for module in modules])
    shown = range(len(layers)) if len(layers) <= 40 else _spread(len(layers), 30)
    slant: dict[str, Any] = {"rotation": 32, "ha": "right", "rotation_mode": "anchor"} if _long(layers) else {}
    axis.set_xticks([i + 0.5 for i in shown], [_text(_shorten(layers[i], 18)) for i in shown], **slant)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if len(layers) <= 32:
        form = "{:.0f}" if high >= 9.95 else "{:.1f}" if high >= 0.995 else "{:.3f}"
        for y, row in enumerate(cells):
            for x, number in enumerate(row):
                if not math.isnan(number):
                    dark = (number - low) > 0.62 * (high - low) and high > low
                    style = {"color": "white" if dark else _INK, "fontsize": 6.5 if len(layers) > 14 else 7.5}
                    axis.text(x + 0.5, y + 0.52, form.format(number), ha="center", va="center", **style)
    axis.set_title(f"{title} by layer and module")
    if not _long(layers):
        axis.set_xlabel("layer", labelpad=2)
    bar = figure.colorbar(image, ax=axis, pad=0.012, fraction=0.022, aspect=14)
    bar.ax.set_ylim(low, high if high > low else low + 1e-12)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)


def _long(layers: Sequence[str]) -> bool:
    return len(layers) > 1 and any(len(layer) > 3 for layer in layers)


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` evenly spread indices, the first and the last among them."""
    step = max(1, math.ceil((count - 1) / (most - 1)))
    return [*range(0, count - 1 - step // 2, step), count - 1] if count > 1 else [0]


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: (width - 1) // 2]}…{text[len(text) - width // 2 :]}"


def _text(text: str) -> str:
    """Safe to draw: no control characters, and no dollar sign that would start a formula."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text).replace("$", r"\$")
