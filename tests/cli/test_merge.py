"""`loratools merge`: weights, where it writes, what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loratools
from loratools_cli.weighted import path_and_weight

Run = Callable[..., Any]
Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors:0.7", "a.safetensors", 0.7),
        ("a.safetensors", "a.safetensors", 1.0),
        ("a:-1e-1", "a", -0.1),
        ("a:.5", "a", 0.5),
        ("C:\\path\\a:0.5", "C:\\path\\a", 0.5),
        ("C:\\path\\a", "C:\\path\\a", 1.0),
        ("a:nan", "a:nan", 1.0),
        (":0.5", ":0.5", 1.0),
    ],
)
def test_weights_follow_the_last_colon(text: str, path: str, weight: float) -> None:
    assert path_and_weight(text) == (Path(path), weight)


def test_a_colon_in_a_name_that_exists_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a:1").mkdir()
    assert path_and_weight(f"{tmp_path}/a:1") == (tmp_path / "a:1", 1.0)
    assert path_and_weight(f"{tmp_path}/a:1:0.5") == (tmp_path / "a:1", 0.5)


def test_it_writes_what_the_library_makes(run: Run, peft: Make, tmp_path: Path) -> None:
    a, b = peft("a", seed=1, rank=4), peft("b", seed=2, rank=3)
    done = run("merge", f"{a}:0.7", f"{b}:-0.3", "-o", tmp_path / "ab", "--json")
    assert done.code == 0, done.err
    merged, report = loratools.merge([(loratools.load(a), 0.7), (loratools.load(b), -0.3)])
    assert done.json["targets"] == json.loads(json.dumps(report.to_dict()["targets"]))
    assert done.json["output"] == str(tmp_path / "ab")
    assert loratools.diff(loratools.load(tmp_path / "ab"), merged, tolerance=1e-12).same
    assert json.loads((tmp_path / "ab" / "adapter_config.json").read_text())["r"] == 7


@pytest.mark.parametrize("method", ["ties", "dare", "knots", "tsv"])
def test_every_method_and_option_arrives(run: Run, peft: Make, tmp_path: Path, method: Any) -> None:
    a, b = peft("a", seed=1), peft("b", seed=2)
    command = ("merge", a, b, "--method", method, "--density", 0.4, "--rank", 5, "--seed", 3, "-o", tmp_path / "ab")
    assert run(*command).code == 0
    pair = [(loratools.load(a), 1.0), (loratools.load(b), 1.0)]
    expected, _ = loratools.merge(pair, 5, options=loratools.Merge(method, 0.4, 3))
    assert loratools.diff(loratools.load(tmp_path / "ab"), expected, tolerance=1e-12).same


def test_the_table_shows_what_became_of_each_input(run: Run, peft: Make, tmp_path: Path) -> None:
    a, b = peft("a", seed=1, n_layers=1), peft("b", seed=2, n_layers=2)
    done = run("merge", a, b, "--method", "ties", "-o", tmp_path / "ab")
    assert "8 + 8 -> 16" in done.out
    assert "- + 8 -> 8" in done.out
    assert "conflicts %" in done.out
    assert "not in all adapters: 3" in done.out
    assert done.out.splitlines()[-1].startswith(f"wrote {tmp_path}/ab: ")
    assert "3 targets are not in all adapters" in done.err
    many = run("merge", peft("c", n_layers=9), peft("d", seed=2, n_layers=9), "-o", tmp_path / "cd").out
    assert "q_proj x9" in many
    assert all(len(line) <= 80 for line in many.splitlines()[:-1])


def test_dry_run_quiet_and_force(run: Run, peft: Make, tmp_path: Path) -> None:
    a, b = peft("a", seed=1), peft("b", seed=2)
    dry = run("merge", a, b, "-o", tmp_path / "ab", "--dry-run")
    assert (dry.code, (tmp_path / "ab").exists()) == (0, False)
    assert "was not written" in dry.out
    assert run("merge", a, b, "-o", tmp_path / "ab", "--quiet").out == f"{tmp_path / 'ab'}\n"
    refused = run("merge", a, b, "-o", tmp_path / "ab")
    assert (refused.code, "--force" in refused.err) == (5, True)
    assert run("merge", a, b, "-o", tmp_path / "ab", "--force").code == 0


def test_rules_budgets_and_ratios(run: Run, peft: Make, tmp_path: Path) -> None:
    a, b = peft("a", seed=1, n_layers=8), peft("b", seed=2, n_layers=8)
    assert run("merge", a, b, "--ratio", 4, "-o", tmp_path / "ab").code == 0
    sizes = {x: (tmp_path / x / "adapter_model.safetensors").stat().st_size for x in ("a", "b", "ab")}
    assert 0.7 * (sizes["a"] + sizes["b"]) / 4 < sizes["ab"] <= (sizes["a"] + sizes["b"]) / 4


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--density", "0.5"], 2, "a sum keeps every entry"),
        (["--rank", "4", "--energy", "0.9"], 2, "exclude each other"),
        (["--drop-extras", "--first-extras"], 2, "exclude each other"),
        (["--max-rank", "4"], 2, "need a rule"),
        (["--relative-to", "self"], 2, "--budget or --ratio"),
    ],
)
def test_wrong_arguments(run: Run, peft: Make, tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    done = run("merge", peft("a"), peft("b", seed=1), "-o", tmp_path / "ab", *arguments)
    assert (done.code, says in done.err) == (code, True), done.err
    assert not (tmp_path / "ab").exists()


def test_one_adapter_is_no_merge(run: Run, peft: Make, tmp_path: Path) -> None:
    done = run("merge", peft("a"), "-o", tmp_path / "ab")
    assert (done.code, "at least two" in done.err) == (2, True)
