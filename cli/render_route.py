"""What people read of texts that were routed."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from loratools.reports.route import Quality, RouteFitReport, RouteReport
from loratools_cli.grids import new_grid, texts
from loratools_cli.text import number, percent, plain, shortened

_SHOWN = 40
_TEXT, _NAME = 36, 24  # characters


def render_route(report: RouteReport, *, everything: bool) -> Iterator[RenderableType]:
    """Every candidate of a single text; a row for each of several."""
    if len(report.texts) == 1:
        yield from _one(report)
    else:
        shown = new_grid("text", "adapter", "cosine", "confidence")
        for routed in report.texts if everything else report.texts[:_SHOWN]:
            best = routed.choice.candidates[0]
            cells = [shortened(routed.choice.adapter, _NAME), f"{best.cosine:.3f}", f"{best.confidence:.2f}"]
            shown.add_row(*texts(shortened(routed.text, _TEXT), *cells))
        yield shown
        if len(report.texts) > _SHOWN and not everything:
            yield Text(f"... and {len(report.texts) - _SHOWN} more; see --all")
    if report.quality is not None:
        yield Text("")
        yield from _quality(report.quality)


def _one(report: RouteReport) -> Iterator[RenderableType]:
    choice = report.texts[0].choice
    shown = new_grid("adapter", "cosine", "confidence")
    for candidate in choice.candidates:
        shown.add_row(*texts(candidate.adapter, f"{candidate.cosine:.3f}", f"{candidate.confidence:.2f}"))
    yield shown
    why = {"threshold": ", for no adapter is near enough", "margin": ", for two are as near"}.get(choice.reason, "")
    yield Text(f"goes to {plain(choice.adapter)}{why}", style="bold")


def render_route_fit(report: RouteFitReport) -> Iterator[RenderableType]:
    """The scenarios, then what the held-out examples tell."""
    shown = new_grid("adapter", "examples", "centroids", "threshold")
    for name, fitted in report.adapters.items():
        shown.add_row(*texts(name, str(fitted.examples), str(fitted.centroids), f"{fitted.threshold:.3f}"))
    yield shown
    yield Text("")
    yield from _quality(report.held_out, "held out: ")


def _quality(quality: Quality, title: str = "") -> Iterator[RenderableType]:
    columns = sorted({choice for counts in quality.confusion.values() for choice in counts})
    if len(columns) <= 5:
        shown = new_grid("of the texts for", *(f"to {shortened(name, 12)}" for name in columns))
        for label, counts in quality.confusion.items():
            shown.add_row(*texts(shortened(label, _NAME), *(str(counts.get(name, 0)) for name in columns)))
        yield shown
    said = []
    if quality.texts and quality.accuracy is not None and quality.nearest is not None:
        said.append(f"{percent(quality.accuracy)} % of {quality.texts} right")
        said.append(f"{percent(quality.rejected or 0.0)} % sent to the base")
        said.append(f"calibration error {number(quality.ece)}")
    if quality.base_rejected is not None:
        said.append(f"{percent(quality.base_rejected)} % of {quality.base_texts} others sent to the base")
    yield Text(f"{title}{', '.join(said)}", style="bold")
    if (regret := quality.regret) is not None:
        base = "" if regret.of_base is None else f", {number(regret.of_base)} with the base alone"
        single = f"{number(regret.single)} with {plain(regret.single_adapter)} for all"
        yield Text(f"regret {number(regret.mean)} a text; {single}{base}", style="bold")
