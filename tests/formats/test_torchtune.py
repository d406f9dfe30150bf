"""torchtune: what it writes for PEFT beside its own file is the truth that ours is compared with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from formats.made import assert_close, f64, rand, write
from safetensors.torch import load_file, save_file

import loratools
from loratools.base_weights import load_base
from loratools.errors import UnmappedModuleError
from loratools.files import load
from loratools.ops.convert import convert

Samples = Callable[[str], Path]
MODEL = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def folder(samples: Samples, tmp_path: Path) -> Path:
    shutil.copytree(samples("others/torchtune_lora"), tmp_path / "tune")
    return tmp_path / "tune"


def test_the_rows_of_heads_are_put_in_order(folder: Path) -> None:
    """Bit for bit what torchtune's own export has."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    made, _ = convert(load(folder / "adapter_model.pt"), "peft")
    export = load(folder / "adapter_model.safetensors")
    assert export.format.name == "peft"
    assert {f"model.{t}" if not t.startswith("model.") else t for t in export} == set(made)
    for target, update in made.items():
        ours, theirs = update.parameters(), export[target].parameters()
        assert all(torch.equal(ours[slot], theirs[slot]) for slot in theirs), target
        assert made.entries[target].scale == export.entries[target].scale


def test_the_order_needs_the_model(folder: Path) -> None:
    adapter = load(folder / "adapter_model.pt")
    with pytest.raises(UnmappedModuleError, match=r"config\.json.*--base"):
        convert(adapter, "peft")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UnmappedModuleError, match="no number of attention heads"):
        convert(load(folder / "adapter_model.pt"), "peft")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    straight, _ = convert(load(folder / "adapter_model.pt"), "peft")
    stored = torch.load(folder / "adapter_model.pt", weights_only=True)
    ours = straight["model.layers.0.self_attn.k_proj"].parameters()["up"]
    assert torch.equal(ours, stored["layers.0.attn.k_proj.lora_b.weight"])


def test_a_base_tells_it_too(folder: Path, tmp_path: Path) -> None:
    """And the delta comes under the base's names, in its rows' order, a magnitude included."""
    base = {f"model.layers.0.self_attn.{p}_proj.weight": rand(i, 8 if p == "k" else 16, 12) for i, p in enumerate("qk")}
    (tmp_path / "model").mkdir()
    save_file(base, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL | {"num_key_value_heads": 2}))
    tensors = {f"layers.0.attn.{p}_proj.lora_a.weight": rand(5, 2, 12) for p in "qk"}
    tensors |= {f"layers.0.attn.{p}_proj.lora_b.weight": rand(6, 8 if p == "k" else 16, 2) for p in "qk"}
    tensors |= {"layers.0.attn.k_proj.magnitude": rand(7, 8)}
    path = write(tmp_path / "made", "adapter_model.pt", tensors, {"r": 2, "lora_alpha": 4})
    weights = load_base(tmp_path / "model")
    found = dict(loratools.delta(load(path, base=weights), base=weights))
    a = f64(tensors["layers.0.attn.q_proj.lora_a.weight"])

    def ordered(rows: np.ndarray, heads: int) -> np.ndarray:
        half = rows.shape[0] // heads // 2
        return np.stack([rows[h * 2 * half + 2 * i + j] for h in range(heads) for j in range(2) for i in range(half)])

    q = ordered(f64(tensors["layers.0.attn.q_proj.lora_b.weight"]), 4)
    assert_close(found["model.layers.0.self_attn.q_proj.weight"], 2.0 * q @ a)
    k = ordered(f64(tensors["layers.0.attn.k_proj.lora_b.weight"]), 2)
    m = ordered(f64(tensors["layers.0.attn.k_proj.magnitude"]), 2)
    w = f64(base["model.layers.0.self_attn.k_proj.weight"])
    v = w + 2.0 * k @ a
    assert_close(
        found["model.layers.0.self_attn.k_proj.weight"], m[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True) - w
    )


def test_alpha_comes_from_the_config_of_old_versions_too(folder: Path) -> None:
    """Which lacked peft_type."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config.pop("peft_type")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert {e.scale for e in load(folder / "adapter_model.pt").entries.values()} == {2.0}
    (folder / "adapter_config.json").unlink()
    adapter = load(folder / "adapter_model.pt")
    assert "state it with --alpha" in adapter.warnings[0]
    assert {e.scale for e in load(folder / "adapter_model.pt", alpha=8).entries.values()} == {2.0}
    assert set(load_file(folder / "base.safetensors")) == {adapter.format.parameter(t) for t in adapter}
