"""`loratools recover`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.tiny import save_tiny_lora, save_tiny_model

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base, adapter, rows."""
    folder = tmp_path_factory.mktemp("places")
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"{i} is ", "answer": "a number"}) for i in range(20)))
    return save_tiny_model(folder / "base"), save_tiny_lora(folder / "adapter"), rows


def test_a_squeezed_adapter_is_trained(run: Run, places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, rows = places
    assert run("squeeze", adapter, "--rank", 2, "-o", tmp_path / "small").code == 0
    usual = ("recover", tmp_path / "small", "--base", base, "--data", rows, "--steps", 6, "--batch", 4)
    done = run(*usual, "-o", tmp_path / "better")
    assert done.code == 0, done.err
    assert done.err.startswith("estimated: ")
    assert "2 held-out rows" in done.out
    assert "NLL of a token" in done.out
    assert f"wrote {tmp_path / 'better'}" in " ".join(done.out.split())
    assert run("info", tmp_path / "better", "--json").json["targets"]
    assert run(*usual, "-o", tmp_path / "better").code == 5
    report = run(*usual, "-o", tmp_path / "better", "--force", "--json").json
    assert (len(report["losses"]), report["rows"], report["held_out"]) == (6, 18, 2)
    done = run(*usual, "-o", tmp_path / "whole", "--held-out", 0)
    assert "no rows were held out" in done.out


def test_a_packed_file_stays_one(run: Run, places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, rows = places
    assert run("quantize", adapter, "--bits", 4, "-o", tmp_path / "small.safetensors").code == 0
    usual = ("recover", tmp_path / "small.safetensors", "--base", base, "--data", rows, "--steps", 4)
    done = run(*usual, "-o", tmp_path / "better.safetensors")
    assert done.code == 0, done.err
    assert "on its grid" in done.out
    assert run("info", tmp_path / "better.safetensors").code == 0


def test_bad_input(run: Run, places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, rows = places
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for data, model, code, words in (
        (tmp_path / "none.jsonl", base, 3, "none.jsonl"),
        (empty, base, 3, "empty.jsonl"),
        (rows, tmp_path, 3, "config.json"),
    ):
        done = run("recover", adapter, "--base", model, "--data", data, "-o", tmp_path / "out")
        assert done.code == code
        assert words in done.err
        assert len(done.err.strip().splitlines()) == 1
    assert run("recover", adapter, "--base", base, "--data", rows, "-o", tmp_path / "out", "--steps", 0).code == 2
    assert not (tmp_path / "out").exists()


def test_a_state_is_gone_on_with_or_thrown_away(run: Run, places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, rows = places
    usual = ("recover", adapter, "--base", base, "--data", rows, "--steps", 2, "-o", tmp_path / "out")
    for last in ("--resume", "--force"):
        (tmp_path / "out.recover.pt").write_bytes(b"not one")
        done = run(*usual)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "out.recover.pt: is what an earlier run came to" in done.err
        assert run(*usual, last).code == 0
        assert not (tmp_path / "out.recover.pt").exists()
        shutil.rmtree(tmp_path / "out")
