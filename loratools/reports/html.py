"""The page of a comparison: one HTML file that works from disk and loads nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from loratools.reports.compare import CompareReport, FineTune, PairNumbers
from loratools.reports.output import require
from loratools.reports.pages import check_place, page, presentable
from loratools.storage.atomic import write_whole

_SCRIPTS: Final = (
    "page_elements.js",
    "page_data.js",
    "page_plots.js",
    "page_sections.js",
    "page_table.js",
    "page_compare.js",
)


def write_html(report: CompareReport, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write `report` as one page with interactive plots and a table; the same report gives the same bytes.

    Raises UsageError for a suffix other than .html, MissingExtraError without plotly, and OutputError where the file
    exists and `force` is not given, or cannot be written.
    """
    return write_whole(place_of(path, force=force), _page(report).encode("utf-8"))


def place_of(path: str | os.PathLike[str], *, force: bool) -> Path:
    """`path`, where a page can be written there; raises what write_html raises."""
    place = check_place(path, force=force)
    require("plotly", extra="report", what="pages")
    return place


def _page(report: CompareReport) -> str:
    from plotly.offline import get_plotlyjs

    data = {key: presentable(value) for key, value in _data(report).items()}
    return page("compare", "page_compare.html", data=data, scripts=_SCRIPTS, libraries=[get_plotlyjs()])


def _data(report: CompareReport) -> dict[str, Any]:
    """What the page shows: names once, then numbers that point at them; keys are the page's own."""
    fine_tunes = {name: i for i, name in enumerate(report.fine_tunes)}
    targets = {name: i for i, name in enumerate(report.targets)}
    rows = list(report.rows())
    columns = [name for name, kind in report.columns.items() if kind != "numbers"]
    return {
        "base": report.base,
        "topK": report.top_k,
        "epsilon": report.epsilon,
        "maxOverlapRank": report.max_overlap_rank,
        "fineTunes": [_fine_tune(name, tune) for name, tune in report.fine_tunes.items()],
        "targets": [
            {"name": name, "layer": t.layer, "module": t.module, "shape": t.shape, "base": t.base_values}
            for name, t in report.targets.items()
        ],
        "columns": [{"key": name, "kind": report.columns[name]} for name in columns],
        "rows": [[row[name] for name in columns] for row in rows],
        "at": [(targets[row["target"]], fine_tunes[row["fine_tune"]]) for row in rows],
        "spectra": [row["spectrum"] for row in rows],
        "pairs": [_pair(pair, fine_tunes) for pair in report.pairs],
        "targetPairs": [
            {"target": i} | _pair(pair, fine_tunes) for i, t in enumerate(report.targets.values()) for pair in t.pairs
        ],
        "maps": [asdict(m) | {"a": fine_tunes[m.a], "b": fine_tunes[m.b]} for m in report.overlap_maps],
        "skipped": list(report.skipped.items()),
        "warnings": report.warnings,
    }


def _fine_tune(name: str, tune: FineTune) -> dict[str, Any]:
    fields = asdict(tune)
    return fields | {"name": name, "layers": list(tune.layers.items()), "modules": list(tune.modules.items())}


def _pair(pair: PairNumbers, fine_tunes: Mapping[str, int]) -> dict[str, Any]:
    return asdict(pair) | {"a": fine_tunes[pair.a], "b": fine_tunes[pair.b]}
