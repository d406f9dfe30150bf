"""The page of a catalog: one HTML file to search, which works from disk and loads nothing."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratools.hub.catalog import read_catalog
from loratools.reports.pages import check_place, page, presentable
from loratools.storage.atomic import write_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST: Final = 64  # singular values of an adapter on the page
_DECADES: Final = 4  # below the largest
_LEVELS: Final = 255

_COLUMNS: Final = {
    "name": "name",
    "status": "status",
    "dialect": "dialect",
    "families": "families",
    "rank": "rank",
    "targets": "targets",
    "bytes": "bytes",
    "warnings": "warnings",
    "reason": "reason",
    "base_model": "base",
    "bytes_before": "before",
    "relative_error": "error",
}
_REPEATED: Final = ("status", "dialect", "families", "base")
_COUNTED: Final = ("targets", "warnings")


def write_page(catalog: Path, path: Path, *, force: bool = False) -> Path:
    """Write a catalog as one page with a table to search; the same catalog gives the same bytes.

    The page has of every adapter its row, and of its spectra one summary of a few dozen bytes. Raises UsageError for a
    suffix other than .html, InputError for what is no catalog, and OutputError where the file exists and `force` is not
    given, or cannot be written.
    """
    place = check_place(path, force=force)
    text = page(
        "hub catalog",
        "page_catalog.html",
        styles=("page_catalog.css",),
        data=_data(catalog),
        scripts=("page_elements.js", "page_theme.js", "page_svg.js", "page_catalog.js"),
    )
    return write_whole(place, text.encode("utf-8"))


def _data(catalog: Path) -> dict[str, Any]:
    """What the page shows, by columns; texts that repeat are stated once."""
    columns: dict[str, list[Any]] = {name: [] for name in (*_COLUMNS.values(), "norm", "top", "spectrum")}
    texts: dict[str, dict[str, int]] = {name: {} for name in _REPEATED}
    members: list[list[str]] = []
    for batch in read_catalog(catalog, [*_COLUMNS, "target_norms", "singular_values"]):
        for name, short in _COLUMNS.items():
            values = batch.column(name)
            if short in _COUNTED:
                columns[short] += values.value_lengths().to_pylist()
                continue
            told = [presentable(value) for value in values.to_pylist()]
            if short not in texts:
                columns[short] += told
                continue
            for value in told:
                text = ", ".join(value) if isinstance(value, list) else value or ""
                if text not in texts[short]:
                    texts[short][text] = len(texts[short])
                    if short == "families":
                        members.append(value)
                columns[short].append(texts[short][text])
        columns["norm"] += [presentable(norm) for norm in _norms(batch.column("target_norms"))]
        for values in _pooled(batch.column("singular_values")):
            columns["top"].append(presentable(float(values[0])) if len(values) else None)
            columns["spectrum"].append(base64.b64encode(_quantised(values)).decode())
    return {
        "source": presentable(catalog.name),
        "most": _MOST,
        "decades": _DECADES,
        "levels": _LEVELS,
        "texts": {name: list(found) for name, found in texts.items()},
        "members": members,
        "columns": columns,
    }


def _norms(lists: Any) -> list[float | None]:
    """Of each adapter: the norm of all its measured targets together; None where there are none."""
    squares = np.nan_to_num(lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64)) ** 2
    present = lists.flatten().is_valid().to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
    sums, counts = np.bincount(owner, squares, len(lists)), np.bincount(owner, present, len(lists))
    return [float(np.sqrt(total)) if count else None for total, count in zip(sums, counts, strict=True)]


def _pooled(lists: Any) -> list[NDArray[np.float64]]:
    """Of each adapter: the root mean square over its measured targets of the i-th singular value, the first few."""
    spectra = lists.flatten()
    owner = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
    lengths = spectra.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    measured = np.bincount(owner, spectra.is_valid().to_numpy(zero_copy_only=False), len(lists))
    longest = np.zeros(len(lists), np.int64)
    np.maximum.at(longest, owner, np.minimum(lengths, _MOST))
    values = np.nan_to_num(spectra.flatten().to_numpy(zero_copy_only=False).astype(np.float64))
    position = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    kept = position < _MOST
    cell = np.repeat(owner, lengths)[kept] * _MOST + position[kept]
    sums = np.bincount(cell, values[kept] ** 2, len(lists) * _MOST).reshape(-1, _MOST)
    return [
        np.sqrt(total[:length] / max(count, 1.0)) for total, length, count in zip(sums, longest, measured, strict=True)
    ]


def _quantised(values: NDArray[np.float64]) -> bytes:
    """One byte for each value: `_LEVELS` for the largest, 1 for what is `_DECADES` below it or less, 0 for zero."""
    levels = np.zeros(len(values), np.uint8)
    positive = values > 0
    share = np.log10(values[positive] / values[:1]) / _DECADES  # 0 for the largest, -1 where the scale ends
    levels[positive] = np.rint(1 + (_LEVELS - 1) * np.clip(1 + share, 0, 1)).astype(np.uint8)
    return levels.tobytes()
