"""`loratools truncate`: slices, with the scale rule of the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import loratools

Run = Callable[..., Any]
Make = Callable[..., Path]


def test_factors_are_slices(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in", rank=8)
    done = run("truncate", source, "--rank", 3)
    assert done.code == 0
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "in.first3" / "adapter_model.safetensors")
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor[:3] if "lora_A" in key else tensor[:, :3])


def test_the_scale_follows_the_method(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in", rank=8)  # alpha 16: scale 2
    rules = {"keep": (2.0, []), "dylora": (8.0, []), "matryoshka": (2.0 * 2, ["--scaling", "sqrt"])}
    for nested, (scale, more) in rules.items():
        done = run("truncate", source, "--rank", 2, "--nested", nested, *more, "-o", tmp_path / nested)
        assert done.code == 0, done.err
        assert loratools.load(tmp_path / nested).entries["model.layers.0.self_attn.q_proj"].scale == scale


def test_matryoshka_needs_its_scaling(run: Run, peft: Make) -> None:
    done = run("truncate", peft(), "--rank", 2, "--nested", "matryoshka")
    assert done.code == 2
    assert "--scaling none, rank or sqrt" in done.err


def test_a_matryoshka_file_states_its_scaling_by_option(run: Run, tmp_path: Path) -> None:
    tensors = {f"layer.{i}.lora_A": torch.randn(24, 8) for i in range(2)}
    tensors |= {f"layer.{i}.lora_B": torch.randn(8, 40) for i in range(2)}
    save_file(tensors, tmp_path / "in.safetensors")
    done = run("truncate", tmp_path / "in.safetensors", "--rank", 4, "--nested", "matryoshka", "--scaling", "rank")
    assert done.code == 0
    assert "--scaling" not in done.err
    assert load_file(tmp_path / "in.first4.safetensors")["layer.0.lora_A"].shape == (24, 4)


def test_dry_run_quiet_and_all(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in", n_layers=9)
    assert "dry run" in run("truncate", source, "--rank", 2, "--dry-run").out
    assert not (tmp_path / "in.first2").exists()
    assert run("truncate", source, "--rank", 2, "--all").out.count("model.layers") == 27
    assert run("truncate", source, "--rank", 3, "-q").out == f"{tmp_path / 'in.first3'}\n"
