"""The file of a catalog: what goes in comes out, elsewhere too, and what is no catalog is said to be none."""

from __future__ import annotations

import errno
import os
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratools.errors import InputError, OutputError
from loratools.hub import catalog
from loratools.hub.catalog import (
    COLUMNS,
    CatalogRow,
    catalog_rows,
    catalog_version,
    read_catalog,
    schema,
    write_catalog,
)

pytest.importorskip("pyarrow")
from pyarrow import parquet


def row(number: int, **more: Any) -> CatalogRow:
    rng = np.random.default_rng(number)
    spectra = (rng.random(3).astype(np.float32), None, rng.random(number % 4).astype(np.float32))
    fields: dict[str, Any] = {
        "dialect": "peft",
        "families": ("lora", "dora"),
        "base_model": None if number % 2 else "tiny",
        "bytes_before": 2**40 + number,
        "bytes": number,
        "relative_error": number / 3,
        "warnings": ("a", "b")[: number % 3],
        "rank": 4,
        "targets": ("q", "k", "v"),
        "target_families": ("lora", "dora", "lora"),
        "target_rows": (4, None, 6),
        "target_columns": (5, None, 7),
        "target_ranks": (3, 4, 0),
        "target_norms": (1.5, None, 0.0),
        "target_reasons": ("", "needs the base", ""),
        "singular_values": spectra,
        "sketch": rng.random(8).astype(np.float32) if number % 2 else None,
        "sketch_targets": ("q",) if number % 2 else None,
        "sketch_seed": 7 if number % 2 else None,
    }
    return CatalogRow(f"a{number}", "done", **{**fields, **more})


def test_rows_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_GROUP_ROWS", 3)
    monkeypatch.setattr(catalog, "_BATCH_ROWS", 2)
    rows = [row(i) for i in range(8)] + [CatalogRow("z", "failed", "why")]
    assert write_catalog(iter(rows), tmp_path / "a.parquet") == 9
    expected = [each.to_dict() for each in rows]
    assert [r for batch in read_catalog(tmp_path / "a.parquet") for r in batch.to_pylist()] == expected
    back = list(catalog_rows(tmp_path / "a.parquet"))
    assert [each.to_dict() for each in back] == expected
    assert back[1].singular_values[0].dtype == np.float32
    assert back[1].families == ("lora", "dora")
    assert parquet.ParquetFile(tmp_path / "a.parquet").metadata.num_row_groups == 3
    write_catalog(back, tmp_path / "b.parquet")  # what was read is what was written
    assert (tmp_path / "b.parquet").read_bytes() == (tmp_path / "a.parquet").read_bytes()


def test_no_rows_are_a_catalog(tmp_path: Path) -> None:
    assert write_catalog([], tmp_path / "a.parquet") == 0
    assert list(catalog_rows(tmp_path / "a.parquet")) == []
    assert catalog_version(tmp_path / "a.parquet")


def test_every_field_has_its_column() -> None:
    assert tuple(schema().names) == COLUMNS


def test_text_that_utf8_cannot_hold_is_escaped(tmp_path: Path) -> None:
    write_catalog([row(0, warnings=("é", "half \ud800"))], tmp_path / "a.parquet")
    (back,) = catalog_rows(tmp_path / "a.parquet")
    assert back.warnings == ("é", "half \\ud800")


def test_only_some_rows_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_GROUP_NUMBERS", 100)
    alive: weakref.WeakSet[CatalogRow] = weakref.WeakSet()
    most = 0

    def made() -> Iterator[CatalogRow]:
        nonlocal most
        for number in range(200):
            each = row(number, sketch=np.zeros(50, np.float32))
            alive.add(each)
            most = max(most, len(alive))
            yield each
            del each

    write_catalog(made(), tmp_path / "a.parquet")
    assert most <= 6
    assert sum(len(batch) for batch in read_catalog(tmp_path / "a.parquet", ["name"])) == 200


def test_other_libraries_read_the_numbers(tmp_path: Path) -> None:
    duckdb, pandas = pytest.importorskip("duckdb"), pytest.importorskip("pandas")
    path = tmp_path / "a.parquet"
    rows = [row(i) for i in range(5)]
    write_catalog(rows, path)
    frame = pandas.read_parquet(path)
    assert list(frame["relative_error"]) == [i / 3 for i in range(5)]
    assert frame["singular_values"][3][0].tolist() == rows[3].singular_values[0].tolist()
    assert frame["singular_values"][3][1] is None
    with duckdb.connect() as database:
        squares = "list_dot_product(singular_values[1], singular_values[1])"
        query = f"select name, singular_values, {squares} from read_parquet(?)"
        found = database.execute(query, [str(path)]).fetchall()
        sizes = database.execute("select sum(bytes_before) from read_parquet(?) where rank = 4", [str(path)])
        assert sizes.fetchone() == (5 * 2**40 + 10,)
    for each, (name, values, squares) in zip(rows, found, strict=True):
        assert name == each.name
        assert values == each.to_dict()["singular_values"]
        assert squares == pytest.approx(float((each.singular_values[0].astype(np.float64) ** 2).sum()), rel=1e-6)


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_catalog([row(i) for i in range(50)], path)
    group = parquet.ParquetFile(path).metadata.row_group(0)
    chunk = next(c for i in range(group.num_columns) if (c := group.column(i)).path_in_schema.startswith("singular"))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    for i in range(start + chunk.total_compressed_size // 2, start + chunk.total_compressed_size):
        data[i] ^= 0xFF
    path.write_bytes(data)
    assert [n for b in read_catalog(path, ["name"]) for n in b.column("name").to_pylist()] == [
        f"a{i}" for i in range(50)
    ]
    with pytest.raises(InputError, match="damaged"):
        list(read_catalog(path, ["singular_values"]))


def test_what_is_no_catalog_is_said_to_be_none(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    write_catalog([row(0)], path)
    whole = path.read_bytes()
    table = parquet.read_table(path)
    with pytest.raises(InputError, match="no such file"):
        read_catalog(tmp_path / "none.parquet")
    with pytest.raises(InputError, match=r"no column 'ranks'.*rank"):
        read_catalog(path, ["ranks"])
    for data in (
        b"",
        b"PAR1",
        b"not a catalog" * 9,
        whole[:-9],
        whole[: len(whole) // 2],
        whole[:4] + b"\xff" * 90 + b"PAR1",
    ):
        (tmp_path / "bad.parquet").write_bytes(data)
        with pytest.raises(InputError, match="no catalog"):
            read_catalog(tmp_path / "bad.parquet")
        with pytest.raises(InputError, match="no catalog"):
            catalog_version(tmp_path / "bad.parquet")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        read_catalog(tmp_path)

    def stored(table: Any, **metadata: str) -> Path:
        parquet.write_table(table.replace_schema_metadata(metadata or table.schema.metadata), tmp_path / "b.parquet")
        return tmp_path / "b.parquet"

    with pytest.raises(InputError, match="but no catalog"):
        read_catalog(stored(table, other="x"))
    with pytest.raises(InputError, match="version '99', not 1"):
        read_catalog(stored(table, **{"loratools.catalog": "99"}))
    with pytest.raises(InputError, match="column rank is missing"):
        read_catalog(stored(table.drop_columns(["rank"])))
    as_text = table.set_column(table.schema.get_field_index("rank"), "rank", pa.array(["4"]))
    with pytest.raises(InputError, match="column rank is missing or of another type"):
        read_catalog(stored(as_text))
    assert len(list(read_catalog(stored(as_text), ["name"]))) == 1


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"before")

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_catalog([row(0)], path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]
    assert path.read_bytes() == b"before"


def test_rows_that_fail_leave_nothing(tmp_path: Path) -> None:
    def rows() -> Iterator[CatalogRow]:
        yield row(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_catalog(rows(), tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == []
