"""The page of a comparison: one HTML file that works from disk and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Final

from loratools._version import __version__
from loratools.reports.compare import CompareReport, FineTune, PairNumbers
from loratools.reports.output import checked, require
from loratools.storage.atomic import write_whole

SUFFIXES = (".html",)
DIGITS = 6  # of numbers on the page; tables and JSON have all

_SCRIPTS: Final = ("page_data.js", "page_plots.js", "page_sections.js", "page_table.js", "page.js")

# Nothing is fetched, and no script runs but the two of the page, whose hashes are known. Styles are not as strict:
# Plotly writes its own.
_POLICY: Final = (
    "default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def write_html(report: CompareReport, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write `report` as one page with interactive plots and a table; the same report gives the same bytes.

    Raises UsageError for a suffix other than .html, MissingExtraError without plotly, and OutputError where the file
    exists and `force` is not given, or cannot be written.
    """
    return write_whole(place_of(path, force=force), _page(report).encode("utf-8"))


def place_of(path: str | os.PathLike[str], *, force: bool) -> Path:
    """`path`, where a page can be written there; raises what write_html raises."""
    place = checked(path, SUFFIXES, "a page", force=force)
    require("plotly", extra="report", what="pages")
    return place


def _page(report: CompareReport) -> str:
    from plotly.offline import get_plotlyjs

    script = "(() => {\n" + '"use strict";\n' + "\n".join(_part(name) for name in _SCRIPTS) + "})();"
    plotly, script = _inline(get_plotlyjs()), _inline(script)
    return Template(_part("page.html")).substitute(
        policy=_POLICY.format(hashes=f"{_hash(plotly)} {_hash(script)}"),
        style=_part("page.css"),
        data=_json(_data(report)),
        plotly=plotly,
        script=script,
    )


def _part(name: str) -> str:
    return files("loratools.reports").joinpath(name).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """A script as it may stand between its tags: nothing in it ends it, and its line ends are those of the parser."""
    script = script.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"<(?=/script|!--)", r"\\x3c", script, flags=re.IGNORECASE)


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON that a script element can hold: ASCII, without the signs that HTML looks for."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(report: CompareReport) -> dict[str, Any]:
    """What the page shows: names once, then numbers that point at them; keys are the page's own."""
    fine_tunes = {name: i for i, name in enumerate(report.fine_tunes)}
    targets = {name: i for i, name in enumerate(report.targets)}
    rows = list(report.rows())
    columns = [name for name, kind in report.columns.items() if kind != "numbers"]
    data = {
        "version": __version__,
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
    return {key: _presentable(value) for key, value in data.items()}


def _fine_tune(name: str, tune: FineTune) -> dict[str, Any]:
    fields = asdict(tune)
    return fields | {"name": name, "layers": list(tune.layers.items()), "modules": list(tune.modules.items())}


def _pair(pair: PairNumbers, fine_tunes: Mapping[str, int]) -> dict[str, Any]:
    return asdict(pair) | {"a": fine_tunes[pair.a], "b": fine_tunes[pair.b]}


def _presentable(value: Any) -> Any:
    """Floats in DIGITS digits, null for those that JSON lacks; what cannot be seen in a text as an escape."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, str):
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    if isinstance(value, Mapping):
        return {key: _presentable(item) for key, item in value.items()}
    return [_presentable(item) for item in value] if isinstance(value, Iterable) else value
