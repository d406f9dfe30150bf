"""Rows as frames, CSV and Parquet, against the report's own plain data."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compare_reports import CALM, HOSTILE, compare_report, gaps

from loratools.errors import MissingExtraError, OutputError, UsageError
from loratools.reports.compare import CompareReport
from loratools.reports.frames import Tabular, write_table
from loratools.reports.intruders import IntrudersReport, Side, TargetIntruders


@pytest.fixture(params=[CALM, HOSTILE], ids=["calm", "hostile"])
def report(request: pytest.FixtureRequest) -> CompareReport:
    return compare_report(request.param, layers=3, modules=("q_proj", 'a "b",\r\nc\rd'))


@pytest.fixture
def intruders() -> IntrudersReport:
    left = Side(1, (1,), (0.9, 0.1 + 0.2), (0.8, 0.1), (0.5, 1e-300))
    right = Side(0, (), (1.0, 0.7), (1.0, 0.7), (1.0, 0.2))
    return IntrudersReport(
        top_k=2,
        epsilon=0.5,
        targets={
            "a": TargetIntruders(left, right, (3.0, 1 / 3), 0.25, "dense", "0", "q", 0.125),
            "b,\n": TargetIntruders(right, left, (2.0, 1.0), 0.0, "dense"),
        },
        total={},
        sweep={},
        by_k={},
        layers={},
        modules={},
        skipped={},
        warnings=(),
    )


def expected(plain: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a comparison, from its JSON."""
    for name, target in plain["targets"].items():
        for fine_tune, update in target["updates"].items():
            row = {"target": name, "fine_tune": fine_tune, "outputs": target["shape"][0], "inputs": target["shape"][1]}
            row |= {key: target[key] for key in ("layer", "module", "base_norm")}
            row |= {key: value for key, value in update.items() if key not in ("gain", "missed")}
            row |= dict(zip(("gain_least", "gain_mean", "gain_greatest"), update["gain"] or [None] * 3, strict=True))
            for key in ("of", "rank", "error", "best_error", "space_error"):
                row[f"missed_{key}"] = update["missed"] and update["missed"][key]
            yield row


def test_rows_are_all_numbers_of_all_updates(report: CompareReport) -> None:
    rows = list(report.rows())
    assert rows == list(expected(report.to_dict()))
    assert len(rows) == 3 * 2 * 3
    assert all(list(row) == list(CompareReport.columns) for row in rows)


def test_csv_round_trip(report: CompareReport, tmp_path: Path) -> None:
    path = write_table(report, tmp_path / "a.csv")
    with path.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, strict=True))
    assert list(found[0]) == list(report.columns)
    for line, row in zip(found, expected(report.to_dict()), strict=True):
        for name, kind in report.columns.items():
            value: Any = line[name] or None
            if value is not None and kind != "text":
                value = tuple(map(float, value.split(" "))) if kind == "numbers" else float(value)
            assert value == row[name], name  # floats to the bit
    raw = path.read_bytes()
    assert raw.startswith(b"target,fine_tune,")
    assert raw.endswith(b"\r\n")


def test_parquet_round_trip(report: CompareReport, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    found = parquet.read_table(write_table(report, tmp_path / "a.parquet")).to_pylist()
    for line, row in zip(found, expected(report.to_dict()), strict=True):
        assert {**line, "spectrum": tuple(line["spectrum"])} == row


def test_gaps_and_numbers_that_are_none(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    report = gaps(compare_report(layers=1))
    table = parquet.read_table(write_table(report, tmp_path / "a.parquet"))
    assert [str(field.type) for field in table.schema][-2:] == ["double", "list<element: double>"]
    row = table.to_pylist()[0]
    assert (row["missed_of"], row["missed_rank"], row["gain_mean"]) == (None, None, None)
    assert row["relative_norm"] == math.inf
    assert math.isnan(row["stable_rank"])
    with write_table(report, tmp_path / "a.csv").open(newline="") as file:
        line = next(csv.DictReader(file))
    assert (line["missed_of"], line["missed_rank"], line["relative_norm"], line["stable_rank"]) == (
        "",
        "",
        "inf",
        "nan",
    )


def test_halves_of_surrogate_pairs_are_spelt_out(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    report = compare_report(["\ud800", "b"], layers=1)
    assert b"\\ud800," in write_table(report, tmp_path / "a.csv").read_bytes()
    write_table(report, tmp_path / "a.parquet")


def test_intruders_have_a_row_for_each_vector(intruders: IntrudersReport, tmp_path: Path) -> None:
    plain = intruders.to_dict()
    rows = list(intruders.rows())
    assert len(rows) == 2 * 2 * 2
    assert all(list(row) == list(IntrudersReport.columns) for row in rows)
    for row in rows:
        target = plain["targets"][row["target"]]
        side, index = target[row["side"]], row["index"]
        assert row["value"] == target["values"][index]
        for name in ("max_cosine", "min_cosine", "matched_cosine"):
            assert row[name] == side[name][index]
        assert row["intruder"] == (side["max_cosine"][index] < 0.5)
        assert row["mitigated_norm"] == target["mitigated_norm"]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(write_table(intruders, tmp_path / "a.parquet")).to_pylist() == rows


def test_frames(report: CompareReport, intruders: IntrudersReport) -> None:
    pd = pytest.importorskip("pandas")
    frame = report.to_frame()
    assert list(frame.columns) == list(report.columns)
    for line, row in zip(frame.to_dict("records"), expected(report.to_dict()), strict=True):
        for name, value in row.items():
            assert pd.isna(line[name]) if value is None else line[name] == value, name
    kinds = {name: str(kind) for name, kind in frame.dtypes.items()}
    assert (kinds["rank"], kinds["missed_rank"], kinds["gain_mean"]) == ("Int64", "Int64", "float64")
    assert intruders.to_frame().query("intruder")["target"].tolist() == ["a", "b,\n"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_same_report_gives_the_same_bytes(report: CompareReport, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("pyarrow")
    first, second = (write_table(report, tmp_path / f"{i}.{suffix}").read_bytes() for i in range(2))
    assert first == second


def test_refusals(report: CompareReport, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.csv or \.parquet; choose one of these suffixes"):
        write_table(report, tmp_path / "a.xlsx")
    taken = tmp_path / "a.csv"
    taken.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        write_table(report, taken)
    assert taken.read_bytes() == b"mine"
    write_table(report, taken, force=True)
    assert taken.read_bytes() != b"mine"
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_table(report, tmp_path / "folder.csv", force=True)
    with pytest.raises(OutputError, match="a parent of it is a file"):
        write_table(report, taken / "b.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "folder.csv"]


def test_csv_needs_no_library(report: Tabular, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert write_table(report, tmp_path / "a.csv").is_file()


def test_what_is_missing_is_named(report: CompareReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loratools\[report\]'"):
        report.to_frame()
    with pytest.raises(MissingExtraError, match=r"pip install 'loratools\[report\]'"):
        write_table(report, tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())
