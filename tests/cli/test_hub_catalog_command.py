"""`loratools hub catalog`: what it writes, says and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub.conftest import write_kohya, write_peft

pytest.importorskip("pyarrow")
from pyarrow import parquet

from loratools.hub.catalog import COLUMNS

Run = Callable[..., Any]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    write_peft(tmp_path / "hub" / "a0", 0)
    write_kohya(tmp_path / "hub" / "k.safetensors", 1)
    return tmp_path / "hub"


def test_a_catalog_and_its_page(run: Run, hub: Path, tmp_path: Path) -> None:
    path, page = tmp_path / "c.parquet", tmp_path / "c.html"
    done = run("hub", "catalog", hub, "-o", path, "--html", page, "--json")
    assert done.code == 0
    assert done.json == {
        "output": str(path), "hub": str(hub), "counts": {"found": 2}, "bytes_before": 0,
        "bytes": sum(f.stat().st_size for f in hub.rglob("*.safetensors")), "failures": {}, "missing": 0,
    }  # fmt: skip
    assert parquet.read_schema(path).names == list(COLUMNS)
    assert page.read_text().startswith("<!doctype html>")
    assert run("hub", "catalog", hub, "-o", path).code == 5
    assert run("hub", "catalog", hub, "-o", tmp_path / "d.parquet", "--html", page).code == 5
    assert not (tmp_path / "d.parquet").exists()  # what cannot be written is refused before the work
    assert run("hub", "catalog", hub, "-o", tmp_path / "d.parquet", "--html", tmp_path / "page.txt").code == 2
    first = path.read_bytes(), page.read_bytes()
    assert run("hub", "catalog", hub, "-o", path, "--html", page, "--force", "--quiet").out == f"{path}\n"
    assert (path.read_bytes(), page.read_bytes()) == first


def test_failures_are_rows_and_an_exit_code(run: Run, hub: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    assert run("hub", "catalog", hub, "-o", path).code == 0
    (hub / "bad\n.safetensors").write_bytes(b"xx")
    done = run("hub", "catalog", hub, "-o", path, "--resume")
    assert done.code == 3
    assert "too few" in " ".join(run("hub", "catalog", hub, "-o", path, "--resume", "--all").out.split())
    assert "1 failed, 2 found" in done.out
    assert f"wrote {path}: 3 rows" in " ".join(done.out.split())
    assert len(done.out.splitlines()) <= 8
    assert max(map(len, done.out.splitlines())) <= max(80, len(f"wrote {path}: 3 rows"))
    said = json.loads(run("hub", "catalog", hub, "-o", path, "--resume", "--json").out)
    assert list(said["failures"]) == ["bad\n.safetensors"]
    assert "too few" in said["failures"]["bad\n.safetensors"]


def test_what_cannot_be_done(run: Run, hub: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    assert run("hub", "catalog", tmp_path / "none", "-o", path).code == 3
    assert run("hub", "catalog", hub, "-o", path, "--workers", 0).code == 2
    assert run("hub", "catalog", hub).code == 2  # no output named
    assert not path.exists()
    path.write_text("mine")
    assert run("hub", "catalog", hub, "-o", path, "--resume").code == 3
    assert path.read_text() == "mine"


def test_without_pyarrow_the_error_names_the_extra(
    run: Run, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratools.reports import output

    real = output.importlib.util.find_spec
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None if name == "pyarrow" else real(name))
    done = run("hub", "catalog", hub, "-o", tmp_path / "c.parquet")
    assert done.code == 4
    assert "pip install 'loratools[hub]'" in done.err
