"""`loratools expand` and `loratools restrict`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Run = Callable[..., Any]
Make = Callable[..., Path]


def plan(folder: Path) -> Path:
    """Heads of keys 1 and 3 of 8, in both layers; each goes with its queries."""
    layer = {"kv_heads": {"removed": [1, 3]}}
    whole = {
        "version": 1,
        "attention": {"heads": 8, "kv_heads": 8, "head_dim": 4},
        "layers": {f"model.layers.{i}": layer for i in range(2)},
    }
    (folder / "plan.json").write_text(json.dumps(whole))
    return folder / "plan.json"


def test_there_and_back_again(run: Run, peft: Make, tmp_path: Path) -> None:
    source, cuts = peft("in"), plan(tmp_path)
    done = run("restrict", source, "--plan", cuts)
    assert (done.code, done.err) == (0, "")
    assert "32 -> 24" in done.out
    small = load_file(tmp_path / "in.pruned" / "adapter_model.safetensors")
    before = load_file(source / "adapter_model.safetensors")
    stay = [i for i in range(32) if i // 4 not in (1, 3)]
    for key, tensor in before.items():
        assert torch.equal(small[key], tensor[stay] if "lora_B" in key else tensor)
    done = run("expand", tmp_path / "in.pruned", "--plan", cuts, "-o", tmp_path / "again", "--json")
    assert done.code == 0
    assert done.json["verb"] == "expand"
    assert done.json["dropped"] == 0.0
    assert done.json["bytes_after"] == (tmp_path / "again" / "adapter_model.safetensors").stat().st_size
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for key, tensor in before.items():
        wanted = tensor.clone()
        if "lora_B" in key:
            wanted[[i for i in range(32) if i not in stay]] = 0.0
        assert torch.equal(again[key], wanted)


def test_heads_of_a_folder_come_from_the_base(run: Run, peft: Make, tmp_path: Path) -> None:
    folder = tmp_path / "idx"
    folder.mkdir()
    for layer in range(2):
        torch.save({"pruned_idx": torch.arange(4, 8)}, folder / f"model.layers.{layer}.self_attn.k_proj.pt")
    done = run("restrict", peft("in"), "--plan", folder, "--dry-run")
    assert done.code == 3
    assert "--base" in done.err
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 8, "hidden_size": 32}))
    done = run("restrict", tmp_path / "in", "--plan", folder, "--base", tmp_path / "config.json", "--dry-run")
    assert done.code == 0
    assert "was not written" in done.out
    assert "32 -> 28" in done.out
