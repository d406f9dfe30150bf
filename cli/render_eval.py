"""How well models do a task, as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import RenderableType
from rich.text import Text

from loratools.reports.evaluate import Estimate, EvalReport, EvalRun
from loratools_cli.grids import new_grid, texts
from loratools_cli.text import plain, shortened, span

_NAME = 30  # characters of a name in a table
_SHARES = ("accuracy", "exact_match")
_SPELT = {
    "exact_match": "match %",
    "accuracy": "accuracy %",
    "nll": "NLL",
    "ece": "ECE",
    "mce": "MCE",
    "classwise_ece": "classwise ECE",
    "ace_top": "ACE, top label",
    "ace_class": "ACE, by class",
    "tace": "TACE",
    "brier": "Brier",
}


def render_eval(report: EvalReport, *, everything: bool) -> Iterator[RenderableType]:
    """A row for each measure of each run, with its difference to the first run where there are several."""
    several = len(report.runs) > 1
    shown = new_grid("measure", "value", "95 % interval", *(["difference", "95 % interval"] if several else []))
    for run in report.runs:
        shown.add_row(*texts(_title(run), style="bold"))
        for label, found, differences in _sections(run):
            for name, estimate in found.items():
                if name == "perplexity" and several and not everything:
                    continue
                cells = [f"  {_SPELT.get(name, name)}{label}", *_cells(name, estimate)]
                if several:
                    cells += _cells(name, differences[name], sign="+") if differences else ["", ""]
                shown.add_row(*texts(*cells))
    yield shown
    if report.aurac is not None:
        for version, estimate in (("v1, over the rank", report.aurac.v1), ("v2, over its logarithm", report.aurac.v2)):
            bounds = f"{estimate.low:.4g} to {estimate.high:.4g}"
            yield Text(f"AURAC {version}: {estimate.value:.4g} ({bounds}), of {report.aurac.measure.replace('_', ' ')}")
    yield Text(_facts(report))
    for run in report.runs:
        if run.temperature is not None:
            yield Text(_temperature(run))
    if everything:
        yield from _bins(report)


def _title(run: EvalRun) -> str:
    return shortened(run.name, _NAME) if run.rank is None else f"rank {run.rank}"


def _sections(run: EvalRun) -> Iterator[tuple[str, Mapping[str, Estimate], Mapping[str, Estimate]]]:
    yield "", run.measures, run.differences
    yield " at T", run.scaled, run.scaled_differences


def _cells(name: str, estimate: Estimate, sign: str = "") -> list[str]:
    unit = 100.0 if name in _SHARES else 1.0
    digits = 1 if name in _SHARES or abs(estimate.value) >= 100 else 4
    value, low, high = (f"{unit * x:{sign}.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return [value, f"{low} to {high}" if sign else f"{low}-{high}"]


def _facts(report: EvalReport) -> str:
    length = "" if report.normalise in (None, "none") else f", by length in {report.normalise}"
    cut = "" if report.cut is None else ", cut by SVD" if report.cut == "svd" else f", slices, scale {report.cut}"
    return (
        f"{report.rows_read} rows, {report.tokens} tokens{length}{cut}; {plain(report.dtype)} on {report.device}; "
        f"{report.resamples} draws, seed {report.seed}"
    )


def _temperature(run: EvalRun) -> str:
    assert run.temperature is not None  # the caller looked
    found = run.temperature
    values = span(found.values, lambda value: f"{value:.3g}")
    how = "from the other parts" if found.how == "crossfit" else "from the other half"
    return f"{_title(run)}: temperature {values}, fitted for {found.rows} rows {how}"


def _bins(report: EvalReport) -> Iterator[RenderableType]:
    """The bins of the ECE that hold anything."""
    for run in report.runs:
        if not run.bins:
            continue
        shown = new_grid(f"{_title(run)}: confidence", "predictions", "mean confidence", "right")
        for held in run.bins:
            if held.confidence is not None and held.accuracy is not None:
                cells = [f"{held.low:.3g} to {held.high:.3g}", str(held.count)]
                shown.add_row(*texts(*cells, f"{held.confidence:.3f}", f"{held.accuracy:.3f}"))
        yield shown
