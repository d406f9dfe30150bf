"""What all figures share: style, files, heat maps, text. Only this file and plot_*.py know matplotlib."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.reports.output import checked, require
from loratools.storage.atomic import write_whole

SUFFIXES = (".png", ".svg")
DECADES = 5  # of singular values shown below the largest
INK, FAINT, SOFT, _EMPTY = "#22303c", "#8a97a3", "#5b6975", "#eef1f4"
_STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.minor.visible": False,
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.6,
    "svg.hashsalt": "loratools",  # the same figure gives the same bytes
    "path.simplify": False,
}


def place_of(path: str | os.PathLike[str], *, force: bool) -> Path:
    """`path`, where a figure can be written there; raises what the functions that write one raise."""
    place = checked(path, SUFFIXES, "a plot", force=force)
    require("matplotlib", extra="plot", what="plots")
    return place


def write_figure(place: Path, draw: Callable[[Any], Any]) -> Path:
    """Write what `draw` makes of matplotlib's class of figures; the same figure gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kind = place.suffix.lower()[1:]
    metadata: dict[str, Any] = {"svg": {"Date": None, "Creator": "loratools"}, "png": {"Software": "loratools"}}
    buffer = io.BytesIO()
    style: Any = dict(_STYLE)
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        draw(Figure).savefig(buffer, format=kind, dpi=160, facecolor="white", metadata=metadata[kind])
    return write_whole(place, _numbered(buffer.getvalue()) if kind == "svg" else buffer.getvalue())


def _numbered(svg: bytes) -> bytes:
    """`svg` with its generated ids numbered: matplotlib hashes memory addresses into those of clip paths."""
    ids = dict.fromkeys(re.findall(rb'id="([a-z][0-9a-f]{10})"', svg))
    numbers = {name: b"%c%d" % (name[0], index) for index, name in enumerate(ids)}
    return re.sub(rb"(?<=[\"#])[a-z][0-9a-f]{10}(?=[\")])", lambda m: numbers.get(m[0], m[0]), svg)


def spectrum_axes(axis: Any, top: float, least: float, longest: int) -> None:
    """Logarithmic axes for singular values from `top` down to `least`, or as far as DECADES go."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_ylim(max(least, top * 10**-DECADES) * 0.7, top * 1.5)
    axis.set_xlim(0.93, max(2, longest) * 1.08)
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    if math.log10(top / least) > 1:  # with less than a decade, the minor ticks are the ones that tell
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(length=2.5, which="both")
    axis.grid(True, which="major")
    axis.set_axisbelow(True)


def means_by_place(
    numbers: Iterable[tuple[str, str, float | None]], layers: Sequence[str], modules: Sequence[str]
) -> list[list[float]]:
    """Means of (layer, module, number) by module (rows) and layer (columns), NaN where there is no number."""
    found: dict[tuple[str, str], list[float]] = {}
    for layer, module, number in numbers:
        if number is not None and math.isfinite(number):
            found.setdefault((module, layer), []).append(number)
    means = {place: math.fsum(values) / len(values) for place, values in found.items()}
    return [[means.get((module, layer), math.nan) for layer in layers] for module in modules]


def map_height(layers: Sequence[str], rows: int) -> float:
    """Inches that a heat map of this many rows takes."""
    return 0.75 + 0.21 * max(2, rows) + (0.55 if long(layers) else 0.0)


def heat_map(
    figure: Any,
    title: str,
    colours: str,
    cells: list[list[float]],
    layers: Sequence[str],
    modules: Sequence[str],
    limits: tuple[float, float] | None = None,
) -> None:
    """One of layers (across) by modules (down), with its numbers where there is room for them.

    `limits` are those of the colours where several maps share them.
    """
    axis = figure.subplots()
    low, high = limits or limits_of([cells])
    image = axis.pcolormesh(
        cells, cmap=colours, vmin=low - 0.15 * (high - low), vmax=high, edgecolors="white", linewidth=1.1
    )
    axis.set_facecolor(_EMPTY)
    axis.invert_yaxis()
    axis.set_yticks([i + 0.5 for i in range(len(modules))], [drawable(shorten(module, 24)) for module in modules])
    shown = range(len(layers)) if len(layers) <= 40 else spread(len(layers), 30)
    slant: dict[str, Any] = {"rotation": 32, "ha": "right", "rotation_mode": "anchor"} if long(layers) else {}
    axis.set_xticks([i + 0.5 for i in shown], [drawable(shorten(layers[i], 18)) for i in shown], **slant)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if len(layers) <= 32:
        form = "{:.0f}" if high >= 9.95 else "{:.1f}" if high >= 0.995 else "{:.3f}"
        for y, row in enumerate(cells):
            for x, number in enumerate(row):
                if not math.isnan(number):
                    dark = (number - low) > 0.62 * (high - low) and high > low
                    style = {"color": "white" if dark else INK, "fontsize": 6.5 if len(layers) > 14 else 7.5}
                    axis.text(x + 0.5, y + 0.52, form.format(number), ha="center", va="center", **style)
    axis.set_title(drawable(f"{title} by layer and module"))
    if not long(layers):
        axis.set_xlabel("layer", labelpad=2)
    bar = figure.colorbar(image, ax=axis, pad=0.012, fraction=0.022, aspect=14)
    bar.ax.set_ylim(low, high if high > low else low + 1e-12)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)


def limits_of(maps: Iterable[list[list[float]]]) -> tuple[float, float]:
    """The least and the greatest number of all maps; NaN counts as none."""
    known = [number for cells in maps for row in cells for number in row if not math.isnan(number)]
    return min(known), max(known)


def long(layers: Sequence[str]) -> bool:
    """Whether the names of layers need to be slanted."""
    return len(layers) > 1 and any(len(layer) > 3 for layer in layers)


def spread(count: int, most: int) -> list[int]:
    """Up to `most` evenly spread indices, the first and the last among them."""
    step = max(1, math.ceil((count - 1) / (most - 1)))
    return [*range(0, count - 1 - step // 2, step), count - 1] if count > 1 else [0]


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` characters: its middle goes."""
    return text if len(text) <= width else f"{text[: (width - 1) // 2]}…{text[len(text) - width // 2 :]}"


def drawable(text: str) -> str:
    """Safe to draw: no control characters, and no dollar sign that would start a formula."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text).replace("$", r"\$")
