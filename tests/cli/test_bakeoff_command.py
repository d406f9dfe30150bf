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
