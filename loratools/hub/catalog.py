"""The catalog of a hub: one Parquet file with a row for each adapter, written and read in bounded memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from loratools._version import __version__
from loratools.errors import InputError
from loratools.reports.output import require
from loratools.storage.atomic import AtomicFile, printable

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

SCHEMA_VERSION: Final = 1
Status = Literal["done", "found", "failed"]

_SCHEMA_KEY: Final = b"loratools.catalog"  # in the metadata of the file; its value is the version of the schema
_VERSION_KEY: Final = b"loratools.version"
_GROUP_ROWS: Final = 4096
_GROUP_NUMBERS: Final = 1 << 20  # singular values and sketches of a row group: 4 MiB
_BATCH_ROWS: Final = 1024


@dataclass(frozen=True, eq=False)
class CatalogRow:
    """One adapter, as it lies in the hub now; the columns of the file are these fields, in this order.

    `status`: `done` by a run, `found` without a receipt of one, or `failed` with the `reason`. What a run alone knows
    is None without its receipt. The fields that begin with `target`, and `singular_values`, are parallel: one entry for
    each target in the order of the file. A target whose delta cannot be had has a reason instead of numbers.
    """

    name: str  # within the hub that was run, or within this one where no run has been
    status: Status
    reason: str = ""
    path: str = ""  # of the weights, relative to the hub; empty where there are none
    dialect: str = ""
    families: tuple[str, ...] = ()
    base_model: str | None = None
    recipe: str | None = None  # digest
    version: str | None = None  # of the loratools that ran the recipe
    bytes_before: int | None = None
    bytes: int = 0  # of the files now
    relative_error: float | None = None  # of the run, over all deltas
    seconds: float | None = None  # of the run
    warnings: tuple[str, ...] = ()
    sha256: str | None = None  # of the weights file, or of the index of several
    sources: tuple[str, ...] = ()  # "sha256 path" of every file that it was read from, which tell whether it changed
    rank: int = 0  # the largest
    targets: tuple[str, ...] = ()
    target_families: tuple[str, ...] = ()
    target_rows: tuple[int | None, ...] = ()  # of the base parameter, as a matrix; of one expert of several
    target_columns: tuple[int | None, ...] = ()
    target_ranks: tuple[int, ...] = ()
    target_norms: tuple[float | None, ...] = ()  # Frobenius, of the delta
    target_reasons: tuple[str, ...] = ()  # why a target has no spectrum; empty where it has one
    singular_values: tuple[NDArray[np.float32] | None, ...] = ()  # of the delta, descending, all blocks together
    sketch: NDArray[np.float32] | None = None  # of the whole adapter, flat
    sketch_targets: tuple[str, ...] | None = None  # what the sketch is of
    sketch_seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as pyarrow reads a row back."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


COLUMNS: Final = tuple(field.name for field in fields(CatalogRow))


def schema() -> pa.Schema:
    """The columns of a catalog, and the metadata that marks the file as one."""
    _require()
    import pyarrow as pa

    text, integer, number, numbers = pa.string(), pa.int64(), pa.float64(), pa.list_(pa.float32())
    kinds = {
        "name": text,
        "status": text,
        "reason": text,
        "path": text,
        "dialect": text,
        "families": pa.list_(text),
        "base_model": text,
        "recipe": text,
        "version": text,
        "bytes_before": integer,
        "bytes": integer,
        "relative_error": number,
        "seconds": number,
        "warnings": pa.list_(text),
        "sha256": text,
        "sources": pa.list_(text),
        "rank": integer,
        "targets": pa.list_(text),
        "target_families": pa.list_(text),
        "target_rows": pa.list_(integer),
        "target_columns": pa.list_(integer),
        "target_ranks": pa.list_(integer),
        "target_norms": pa.list_(number),
        "target_reasons": pa.list_(text),
        "singular_values": pa.list_(numbers),
        "sketch": numbers,
        "sketch_targets": pa.list_(text),
        "sketch_seed": integer,
    }
    stated = {_SCHEMA_KEY: str(SCHEMA_VERSION).encode(), _VERSION_KEY: __version__.encode()}
    return pa.schema(kinds.items(), stated)


def write_catalog(rows: Iterable[CatalogRow], path: Path) -> int:
    """Stream rows to a Parquet file at `path`, in their order, and count them; the same rows give the same bytes.

    A row group at a time is in memory. Raises MissingExtraError without pyarrow, and OutputError where the file cannot
    be written; what was there is then as it was.
    """
    layout = schema()
    from pyarrow import parquet

    count = 0
    file = AtomicFile(path)
    try:
        sink = _Sink(file)
        with parquet.ParquetWriter(
            sink, layout, compression="zstd", use_dictionary=_REPEATED, write_page_checksum=True
        ) as writer:
            for group in _groups(rows):
                writer.write_batch(_batch(group, layout))
                count += len(group)
        file.commit(sink.tell())
    finally:
        file.abort()
    return count


def read_catalog(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows in their order, some at a time, with only the columns asked for read from the disk.

    Raises MissingExtraError without pyarrow, and InputError for what is no catalog, is one of another version, or lacks
    a column, now; for data that is damaged when it is reached.
    """
    layout = schema()
    from pyarrow import parquet

    wanted = list(COLUMNS if columns is None else columns)
    with _explained(path):
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        _check(file.schema_arrow, layout, wanted, path)
    return _batches(file, wanted, path)


def catalog_rows(path: Path) -> Iterator[CatalogRow]:
    """The rows of a catalog; raises what `read_catalog` raises."""
    for batch in read_catalog(path):
        columns = {name: _values(batch.column(name), name) for name in COLUMNS}
        for i in range(batch.num_rows):
            yield CatalogRow(**{name: column[i] for name, column in columns.items()})


def catalog_version(path: Path) -> str:
    """The version of the loratools that wrote a catalog; raises what `read_catalog` raises."""
    layout = schema()
    from pyarrow import parquet

    with _explained(path):
        stated = parquet.read_schema(path)
        _check(stated, layout, [], path)
    return str((stated.metadata or {}).get(_VERSION_KEY, b"").decode("utf-8", "replace"))


# Columns that say the same in many rows; to look for repetitions in the others costs time and gains nothing.
_REPEATED: Final = [
    *("status", "reason", "dialect", "base_model", "recipe", "version"),
    *(f"{name}.list.element" for name in ("families", "warnings", "targets", "target_families", "target_rows")),
    *(f"{name}.list.element" for name in ("target_columns", "target_ranks", "target_reasons", "sketch_targets")),
]


class _Sink(io.RawIOBase):
    """An atomic file as pyarrow writes to it."""

    def __init__(self, file: AtomicFile) -> None:
        self._file, self._at = file, 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write_at(self._at, view)
        self._at += len(view)
        return len(view)


def _groups(rows: Iterable[CatalogRow]) -> Iterator[list[CatalogRow]]:
    group: list[CatalogRow] = []
    numbers = 0
    for row in rows:
        group.append(row)
        numbers += sum(len(s) for s in row.singular_values if s is not None)
        numbers += 0 if row.sketch is None else len(row.sketch)
        if len(group) >= _GROUP_ROWS or numbers >= _GROUP_NUMBERS:
            yield group
            group, numbers = [], 0
    if group:
        yield group


def _batch(rows: Sequence[CatalogRow], layout: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    columns = []
    for field in layout:
        values = [getattr(row, field.name) for row in rows]
        if field.name == "sketch":
            columns.append(_lists(values))
        elif field.name == "singular_values":
            ends = np.cumsum([0, *(len(spectra) for spectra in values)], dtype=np.int32)
            inner = _lists([spectrum for spectra in values for spectrum in spectra])
            columns.append(pa.ListArray.from_arrays(pa.array(ends), inner))
        else:
            columns.append(_column(values, field.type))
    return pa.RecordBatch.from_arrays(columns, schema=layout)


def _column(values: list[Any], kind: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array(_encodable(values), kind)


def _lists(parts: Sequence[NDArray[np.float32] | None]) -> Any:
    """A column of lists of float32, from arrays or gaps, without a Python object for each number."""
    import pyarrow as pa

    ends = np.cumsum([0, *(0 if part is None else len(part) for part in parts)], dtype=np.int32)
    gaps = np.array([*(part is None for part in parts), False])
    whole = [np.asarray(part, np.float32) for part in parts if part is not None]
    numbers = np.concatenate(whole) if whole else np.empty(0, np.float32)
    return pa.ListArray.from_arrays(pa.array(ends, mask=gaps), pa.array(numbers))


def _encodable(value: Any) -> Any:
    """With text that UTF-8 can hold: JSON headers may have halves of surrogate pairs."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")
    return [_encodable(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, tuple) else _encodable(value)


def _values(column: Any, name: str) -> list[Any]:
    """A column as the fields of rows have it."""
    if name == "sketch":
        return _arrays(column)
    if name == "singular_values":
        flat, ends = _arrays(column.flatten()), column.offsets.to_numpy() - column.offsets[0].as_py()
        return [tuple(flat[a:b]) for a, b in pairwise(ends)]
    return [tuple(value) if isinstance(value, list) else value for value in column.to_pylist()]


def _arrays(lists: Any) -> list[NDArray[np.float32] | None]:
    numbers, ends = lists.flatten().to_numpy(zero_copy_only=False), np.zeros(len(lists) + 1, np.int64)
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    np.cumsum(lengths, out=ends[1:])
    valid = lists.is_valid().to_numpy(zero_copy_only=False)
    return [numbers[a:b] if ok else None for (a, b), ok in zip(pairwise(ends), valid, strict=True)]


def _batches(file: Any, columns: list[str], path: Path) -> Iterator[pa.RecordBatch]:
    with _explained(path), file:
        yield from file.iter_batches(_BATCH_ROWS, columns=columns)


def _check(found: pa.Schema, layout: pa.Schema, wanted: Sequence[str], path: Path) -> None:
    where, remedy = printable(path), "write it again with loratools hub catalog"
    version = (found.metadata or {}).get(_SCHEMA_KEY)
    if version is None:
        raise InputError(f"{where}: is a Parquet file, but no catalog; write one with loratools hub catalog")
    if version != str(SCHEMA_VERSION).encode():
        shown = version.decode("utf-8", "replace")[:20]
        raise InputError(f"{where}: is a catalog of version {shown!r}, not {SCHEMA_VERSION}; {remedy}")
    for name in wanted:
        if name not in layout.names:
            raise InputError(f"{where}: a catalog has no column {name!r}; there are {', '.join(COLUMNS)}")
        if name not in found.names or found.field(name).type != layout.field(name).type:
            raise InputError(f"{where}: the column {name} is missing or of another type; {remedy}")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what pyarrow and the system say of a file into an InputError."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{printable(path)}: no such file; write it with loratools hub catalog") from None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{printable(path)}: is no catalog, or a damaged one: {reason}") from error


def _require() -> None:
    require("pyarrow", extra="hub", what="catalogs")
