"""`loratools reparameterize` and `loratools families`."""

from __future__ import annotations

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


def test_it_is_written_beside_the_input_and_comes_back(run: Run, lora: Path) -> None:
    done = run("reparameterize", lora, "--to", "ldu")
    assert done.code == 0
    assert "all 3" in done.out
    there = lora.with_name("in.ldu.safetensors")
    assert f"wrote {there}" in done.out
    back = lora.with_name("back.safetensors")
    assert run("reparameterize", there, "--to", "lora", "-o", back).code == 0
    assert run("diff", lora, back).code == 0
    assert run("info", there).code == 0
    assert run("inspect", there).code == 0


def test_json_dry_run_and_all(run: Run, lora: Path) -> None:
    report = run("reparameterize", lora, "--to", "ldu", "--rank", 5, "--dry-run", "--json").json
    assert report["options"] == {"rank": 5}
    assert report["family"] == "ldu"
    assert len(report["targets"]) == 3
    assert not lora.with_name("in.ldu.safetensors").exists()
    done = run("reparameterize", lora, "--to", "ldu", "--set", "rank=5", "--all", "--dry-run")
    assert done.out.count("_q") >= 3
    assert "dry run" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--to", "nonsense"), 2, "there are: "),
        (("--to", "ldu", "--set", "rank"), 2, "NAME=VALUE"),
        (("--to", "ldu", "--set", "rank=two"), 2, "not of type int"),
        (("--to", "ldu", "--set", "depth=2"), 2, "there are: rank"),
        (("--to", "ldu", "--rank", "2", "--set", "rank=2"), 2, "given twice"),
        (("--to", "ldu", "--rank", "2", "--budget", "1kB"), 2, "one or the other"),
        (("--to", "ldu", "--budget", "10B"), 2, "too small"),
        (("--to", "lora", "--rank", "0"), 2, "rank"),
        (("--to", "ldu", "--rank", "-1"), 2, "rank"),
        (("--to", "lora", "--rank", "1"), 4, "--accept-loss"),
    ],
)
def test_wrong_calls_fail_in_one_line(run: Run, lora: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = run("reparameterize", lora, *arguments)
    assert done.code == code
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert list(lora.parent.iterdir()) == [lora]


def test_loss_can_be_accepted_and_nothing_is_overwritten(run: Run, lora: Path) -> None:
    assert run("reparameterize", lora, "--to", "lora", "--rank", 1, "--accept-loss").code == 0
    done = run("reparameterize", lora, "--to", "lora", "--rank", 1, "--accept-loss")
    assert done.code == 5
    assert run("reparameterize", lora, "--to", "lora", "--rank", 1, "--accept-loss", "--force").code == 0


def test_one_family_is_told_in_full(run: Run) -> None:
    done = run("families", "ldu")
    assert done.code == 0
    assert "P L D U Q" in done.out
    assert "rank=None" in done.out
    assert run("families", "nonsense").code == 2
    assert "no family 'LoRA', perhaps lora" in run("families", "LoRA").err
    assert run("families").out.index("\nldu ") < run("families").out.index("these are read:")
    assert list(run("families", "ldu", "--json").json["families"]) == ["ldu"]
    assert "ldu" in run("families").out
