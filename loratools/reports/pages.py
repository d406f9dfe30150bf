"""Pages that are one HTML file: nothing is loaded, no script runs but their own, and all text of a report is data."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Final

from loratools._version import __version__
from loratools.reports.output import checked

DIGITS = 6  # of numbers on a page; tables and JSON have all

_SUFFIXES: Final = (".html",)

# Nothing is fetched, and no script runs but those of the page, whose hashes are known. Styles are not as strict:
# Plotly writes its own.
_POLICY: Final = (
    "default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def page(
    command: str,
    body: str,
    *,
    data: Any,
    scripts: Sequence[str],
    styles: Sequence[str] = (),
    libraries: Sequence[str] = (),
) -> str:
    """A whole page of a command: `body` in the frame of all, `data` as JSON, `libraries`, then `scripts` as one."""
    script = "(() => {\n" + '"use strict";\n' + "\n".join(_part(name) for name in scripts) + "})();"
    parts = [_inline(text) for text in (*libraries, script)]
    return Template(_part("page.html")).substitute(
        command=escape(command),
        policy=_POLICY.format(hashes=" ".join(map(_hash, parts))),
        style="".join(map(_part, ("page.css", *styles))),
        body=_part(body),
        version=__version__,
        data=_json(data),
        scripts="\n".join(f"<script>{part}</script>" for part in parts),
    )


def check_place(path: str | os.PathLike[str], *, force: bool) -> Path:
    """`path`, where a page can be written there.

    Raises UsageError for a suffix other than .html, and OutputError where the file exists and `force` is not given, or
    nothing can be written.
    """
    return checked(path, _SUFFIXES, "a page", force=force)


def presentable(value: Any) -> Any:
    """Floats in DIGITS digits, null for those that JSON lacks; what cannot be seen in a text as an escape."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, str):
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    if isinstance(value, Mapping):
        return {key: presentable(item) for key, item in value.items()}
    return [presentable(item) for item in value] if isinstance(value, Iterable) else value


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
