"""Reports as tables: data frames, CSV and Parquet, all from the rows that a report defines once."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol

from loratools.reports.output import checked, require
from loratools.storage.atomic import write_whole

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet")

# What a column holds; every kind but "flag" and "numbers" may have gaps (None).
Kind = Literal["text", "integer", "number", "flag", "numbers"]

_DTYPES: Final[Mapping[Kind, str]] = {
    "text": "string",
    "integer": "Int64",  # the one of pandas that has gaps
    "number": "float64",
    "flag": "bool",
    "numbers": "object",
}


class Tabular(Protocol):
    """A report with rows: plain dicts with the keys of `columns`, in that order."""

    columns: ClassVar[Mapping[str, Kind]]

    def rows(self) -> Iterator[dict[str, Any]]: ...

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame; MissingExtraError without pandas."""
        return to_frame(self)


def to_frame(report: Tabular) -> pd.DataFrame:
    """The rows as a pandas frame; a gap is <NA>, or NaN in a column of floats. MissingExtraError without pandas."""
    require("pandas", extra="report", what="data frames")
    import pandas as pd

    columns = _columns(report)
    return pd.DataFrame({name: pd.Series(columns[name], dtype=_DTYPES[kind]) for name, kind in report.columns.items()})


def write_table(report: Tabular, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the rows as CSV or Parquet by the suffix of `path`; every float comes back as it was.

    CSV is that of RFC 4180 in UTF-8: a gap is an empty field, and a list of numbers is separated by spaces. Raises
    UsageError for another suffix, MissingExtraError for Parquet without pyarrow, and OutputError where the file exists
    and `force` is not given, or cannot be written.
    """
    place = place_of(path, force=force)
    return write_whole(place, _csv(report) if place.suffix.lower() == ".csv" else _parquet(report))


def place_of(path: str | os.PathLike[str], *, force: bool) -> Path:
    """`path`, where a table can be written there; raises what write_table raises."""
    place = checked(path, SUFFIXES, "a table", force=force)
    if place.suffix.lower() == ".parquet":
        require("pyarrow", extra="report", what="Parquet files")
    return place


def _csv(report: Tabular) -> bytes:
    buffer = io.StringIO(newline="")
    lines = csv.writer(buffer)
    lines.writerow(report.columns)
    for row in report.rows():
        lines.writerow(" ".join(map(repr, v)) if isinstance(v, tuple) else v for v in row.values())
    return buffer.getvalue().encode("utf-8", "backslashreplace")


def _parquet(report: Tabular) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    types: dict[Kind, Any] = {
        "text": pa.string(),
        "integer": pa.int64(),
        "number": pa.float64(),
        "flag": pa.bool_(),
        "numbers": pa.list_(pa.float64()),
    }
    schema = pa.schema([(name, types[kind]) for name, kind in report.columns.items()])
    buffer = io.BytesIO()
    parquet.write_table(pa.table(_columns(report), schema=schema), buffer)
    return buffer.getvalue()


def _columns(report: Tabular) -> dict[str, list[Any]]:
    """The rows turned around, with text that UTF-8 can hold: JSON headers may have halves of surrogate pairs."""
    columns: dict[str, list[Any]] = {name: [] for name in report.columns}
    for row in report.rows():
        for name, value in row.items():
            if isinstance(value, str):
                value = value.encode("utf-8", "backslashreplace").decode("utf-8")
            columns[name].append(value)
    return columns
