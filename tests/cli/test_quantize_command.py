"""`loratools quantize`, `dequantize` and `squeeze --bits auto`: where they write, what they say, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loratools

Run = Callable[..., Any]
Make = Callable[..., Path]


def test_an_adapter_of_any_dialect_becomes_one_file_beside_it(
    run: Run, peft: Make, kohya: Make, tmp_path: Path
) -> None:
    peft("folder")
    for source, name in (
        (tmp_path / "folder", "folder.grid6bit.safetensors"),
        (kohya("a.safetensors"), "a.grid6bit.safetensors"),
    ):
        done = run("quantize", source, "--bits", 6)
        assert done.code == 0
        assert done.out.splitlines()[-1].startswith(f"wrote {tmp_path}/{name}: ")
        assert "bits of the file to a number of the input" in done.out
        assert loratools.load(tmp_path / name).origin.container == "packed"  # type: ignore[union-attr]


def test_what_lies_on_a_grid_is_packed_as_it_is(run: Run, peft: Make, tmp_path: Path) -> None:
    run("quantize", peft("in"), "--bits", 3, "-o", tmp_path / "small")
    done = run("dequantize", tmp_path / "small.safetensors", "--dtype", "f32", "-o", tmp_path / "again")
    assert done.code == 0, done.err
    done = run("quantize", tmp_path / "again", "--method", "exact", "--json")
    assert done.code == 0, done.err
    assert done.json["output"] == str(tmp_path / "again.exact.safetensors")
    assert {t["coding"] for t in done.json["targets"].values()} == {"grid, exact"}
    assert done.json["total"]["relative_error"] < 1e-7
    refused = run("quantize", tmp_path / "again", "--method", "exact", "--bits", 3)
    assert refused.code == 2
    assert "--method exact keeps the numbers as they are; it takes no --bits" in refused.err
    assert run("quantize", tmp_path / "in", "--method", "exact").code == 4


def test_json_is_the_report(run: Run, peft: Make, tmp_path: Path) -> None:
    done = run("quantize", peft("in"), "--bits", 4, "--method", "rtn", "-o", tmp_path / "out", "--json")
    assert set(done.json) == {"targets", "unchanged", "total", "warnings", "output"}
    assert done.json["output"] == str(tmp_path / "out.safetensors")
    assert done.json["total"]["bytes_after"] == (tmp_path / "out.safetensors").stat().st_size
    assert {t["coding"] for t in done.json["targets"].values()} == {"4-bit rtn"}


def test_a_dry_run_writes_nothing_and_knows_the_size(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in")
    planned = run("quantize", source, "--bits", 5, "--dry-run", "--json").json["total"]
    assert not list(tmp_path.glob("*.safetensors"))
    assert run("quantize", source, "--bits", 5, "--json").json["total"] == planned


def test_info_says_how_it_is_written(run: Run, peft: Make, tmp_path: Path) -> None:
    run("quantize", peft("in"), "--bits", 4, "--method", "rtn", "-o", tmp_path / "out")
    said = run("info", tmp_path / "out.safetensors").out
    assert "peft in packed" in said
    assert "4-bit uniform" in said
    assert run("info", tmp_path / "out.safetensors", "--json").json["codings"] == {"4-bit uniform": 12}


def test_dequantize_makes_an_ordinary_adapter_again(run: Run, peft: Make, tmp_path: Path) -> None:
    run("quantize", peft("in"), "--bits", 8, "--method", "rtn", "-o", tmp_path / "out")
    done = run("dequantize", tmp_path / "out.safetensors", "--to", "peft", "-o", tmp_path / "back")
    assert done.code == 0
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    one, other = loratools.load(tmp_path / "out.safetensors"), loratools.load(tmp_path / "back")
    assert loratools.diff(one, other).to_dict()["total"]["relative_error"] < 1e-6
    again = run("dequantize", tmp_path / "back")
    assert again.code == 2
    assert "is an ordinary adapter already" in again.err


def test_ranks_and_bits_for_a_size(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in", rank=16, size=256)
    done = run("squeeze", source, "--budget", "20kB", "--bits", "auto", "-o", tmp_path / "small", "--json")
    assert done.code == 0
    assert 18_000 < done.json["total"]["bytes_after"] <= 20_000
    refused = run("squeeze", source, "--rank", 4, "--bits", "auto")
    assert refused.code == 2
    assert "give --budget or --ratio with it" in refused.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "how small is not clear: give --bits, --budget or --ratio"),
        (["--bits", 4, "--ratio", 4], "--bits and --ratio exclude each other"),
        (["--bits", 3, "--method", "sign"], "signs take 1 bit, not 3"),
        (["--budget", "1MB", "--method", "rtn"], "a budget in bytes is met by --method grid"),
        (["--ratio", 0.5], "leaves nothing or more"),
        (["--budget", "12B"], "a budget of 12 bytes is too small"),
    ],
)
def test_choices_that_make_no_sense_are_usage_errors(
    run: Run, peft: Make, tmp_path: Path, arguments: list[object], said: str
) -> None:
    done = run("quantize", peft("in"), *arguments)
    assert done.code == 2
    assert said in done.err
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_output_that_exists_is_kept(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in")
    (tmp_path / "out.safetensors").write_text("mine")
    done = run("quantize", source, "--bits", 4, "-o", tmp_path / "out")
    assert "exists already" in done.err
    assert (tmp_path / "out.safetensors").read_text() == "mine"
    assert run("quantize", source, "--bits", 4, "-o", tmp_path / "out", "--force").code == 0
