"""What is written beside the output: refused before the work where it could not be written after it."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_reports import compare_report
from safetensors.torch import save_file

import loratools
from loratools.errors import LoratoolsError, MissingExtraError, OutputError, UsageError
from loratools_cli.exports import check_exports, write_exports

Run = Callable[..., Any]
Make = Callable[..., Path]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    modules = [f"model.layers.{i}.self_attn.{m}" for i in range(2) for m in ("q_proj", "k_proj", "v_proj")]
    save_file({f"{m}.weight": torch.randn(32, 32, generator=generator) for m in modules}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def test_all_three_are_written(tmp_path: Path) -> None:
    for module in ("matplotlib", "plotly", "pyarrow"):
        pytest.importorskip(module)
    places = {"page": tmp_path / "a.html", "figure": tmp_path / "a.svg", "table": tmp_path / "a.parquet"}
    check_exports(**places)
    assert not list(tmp_path.iterdir())  # a check leaves no trace
    write_exports(compare_report(layers=1), **places)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.parquet", "a.svg"]
    for name, path in places.items():
        with pytest.raises(OutputError, match="exists already"):
            check_exports(**{name: path})
    check_exports(**places, force=True)
    write_exports(compare_report(layers=1), **places, force=True)


@pytest.mark.parametrize(
    ("kind", "name", "error"),
    [
        ("page", "a.pdf", UsageError),
        ("figure", "a.html", UsageError),
        ("table", "a.json", UsageError),
        ("table", "taken/a.csv", OutputError),
    ],
)
def test_what_could_not_be_written_is_refused(
    tmp_path: Path, kind: str, name: str, error: type[LoratoolsError]
) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(error):
        check_exports(**{kind: tmp_path / name})


@pytest.mark.parametrize(
    ("kind", "name", "module"),
    [("page", "a.html", "plotly"), ("figure", "a.png", "matplotlib"), ("table", "a.parquet", "pyarrow")],
)
def test_a_library_that_is_missing_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"need {module}: pip install"):
        check_exports(**{kind: tmp_path / name})


def test_intruders_as_a_table(run: Run, peft: Make, base: Path, tmp_path: Path) -> None:
    source = peft()
    done = run("intruders", base, source, "--table", tmp_path / "a.csv", "--json")
    assert (done.code, done.err) == (0, f"wrote {tmp_path / 'a.csv'}\n")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    report = loratools.intruders(loratools.load(source), loratools.load_base(base))
    assert done.json == json.loads(json.dumps(report.to_dict()))
    assert [float(row["max_cosine"]) for row in rows] == [row["max_cosine"] for row in report.rows()]
    assert len(rows) == 6 * 2 * 10


def test_an_existing_table_is_refused_before_the_base_is_read(run: Run, peft: Make, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"mine")
    done = run("intruders", tmp_path / "no base", peft(), "--table", tmp_path / "a.csv")
    assert done.code == 5
    assert "exists already" in done.err
    assert (tmp_path / "a.csv").read_bytes() == b"mine"


def test_an_unsuitable_plot_is_refused_before_the_adapter_is_read(run: Run, tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "no adapter", "--plot", tmp_path / "a.pdf")
    assert done.code == 2
    assert ".png or .svg" in done.err


def test_mitigation_writes_a_table_and_a_dry_run_does_not(run: Run, peft: Make, base: Path, tmp_path: Path) -> None:
    source, table = peft(), tmp_path / "a.csv"
    options = ("intruders", base, source, "--mitigate", 0.5, "-o", tmp_path / "calm", "--table", table)
    assert run(*options, "--dry-run").code == 0
    assert not table.exists()
    assert run(*options).code == 0
    with table.open(newline="") as file:
        assert any(float(row["mitigated_norm"] or 1) != 1 for row in csv.DictReader(file))
