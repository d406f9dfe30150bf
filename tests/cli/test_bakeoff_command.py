"""`loratools bakeoff`."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

Run = Callable[..., Any]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(3):
        tensors[f"lora_unet_{i}_q.lora_down.weight"] = torch.randn(6, 24, generator=generator)
        tensors[f"lora_unet_{i}_q.lora_up.weight"] = torch.randn(32, 6, generator=generator)
        tensors[f"lora_unet_{i}_q.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def test_a_table_a_figure_and_a_file_of_numbers(run: Run, lora: Path, tmp_path: Path) -> None:
    figure, table = tmp_path / "f.svg", tmp_path / "t.csv"
    arguments = ("--families", "lora,ldu", "--budget", "3kB,4kB", "--plot", figure, "--table", table)
    done = run("bakeoff", lora, *arguments)
    assert done.code == 0
    assert "3 targets" in done.out
    assert done.out.count("loratools reparameterize IN --to") == 2
    assert all(len(line) <= 80 for line in done.out.splitlines())
    assert "low-rank optimum" in figure.read_text()
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(r["family"], r["budget"]) for r in rows] == [
        (e["family"], str(e["budget"])) for e in run("bakeoff", lora, *arguments[:4], "--json").json["entrants"]
    ]


def test_families_that_are_left_out_for_one_reason_share_a_line(run: Run, lora: Path) -> None:
    done = run("bakeoff", lora, "--families", "lora,ldu,hydra,salt,paca", "--budget", "1kB,4kB")
    assert done.code == 0
    assert all(len(line) <= 80 for line in done.out.splitlines())
    without = [line.strip() for line in done.out.splitlines() if "without" in line]
    assert [line.split(":")[0] for line in without] == ["without lora, ldu", "without hydra, salt, paca"]
    assert "no file of 1.00 kB" in without[0]
    assert "base model" in without[1]


def test_commands_for_a_sample_say_so(run: Run, lora: Path) -> None:
    arguments = ("bakeoff", lora, "--families", "lora", "--budget", "4kB")
    sampled = run(*arguments, "--sample", "2")
    assert "2 of 3 targets" in sampled.out
    assert "where IN is a file of these 2 targets alone" in sampled.out
    assert "targets alone" not in run(*arguments, "--sample", "0").out
    shown = run(*arguments, "--sample", "2", "--json").json
    assert (len(shown["targets"]), shown["available"]) == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--families", "nonsense"), 2, "there are: "),
        (("--budget", "much"), 2, "much"),
        (("--budget", "10B"), 4, "no family"),
        (("--target", "nowhere"), 4, "no target"),
        (("--sample", "-1"), 2, "above 0"),
    ],
)
def test_wrong_calls_fail_in_one_line(run: Run, lora: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = run("bakeoff", lora, *arguments)
    assert done.code == code
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1
