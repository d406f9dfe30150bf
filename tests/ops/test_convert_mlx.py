"""MLX-LM files that a conversion writes: one rank, one scale, and the deltas that the source had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools.adapter import Adapter
from loratools.base_weights import load_base
from loratools.errors import UnmappedModuleError, UnsupportedInTargetError
from loratools.files import load
from loratools.ops.convert import convert, convert_file

Samples = Callable[[str], Path]

PEFT = ("lora_plain", "lora_f16", "old_bin", "rslora", "lora_all_linear", "exclude_modules", "lora_embedding")
UNIFORM = [f"peft/{name}" for name in PEFT] + ["others/adapters_lora_llama_full"]


def written(adapter: Adapter, folder: Path, to: str = "mlx") -> Adapter:
    saved, _ = convert_file(adapter, folder, to)
    return load(saved.path)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def by_formula(folder: Path) -> dict[str, np.ndarray]:
    """The delta of every module, as MLX-LM's layers compute it."""
    scale = config_of(folder)["lora_parameters"]["scale"]
    tensors = {key: t.double().numpy() for key, t in load_file(folder / "adapters.safetensors").items()}
    names = {key.rpartition(".")[0] for key in tensors}
    products = {name: scale * tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"] for name in names}
    return {name: d if name.endswith("embed_tokens") else d.T for name, d in products.items()}


@pytest.mark.parametrize("name", [*UNIFORM, "peft/rank_alpha_pattern"])
def test_mlx_computes_the_delta_of_the_source(samples: Samples, tmp_path: Path, name: str) -> None:
    source = samples(name)
    reference = load_file(source / "reference_dW.safetensors")
    before = load(source)
    written(before, tmp_path / "out")
    found = by_formula(tmp_path / "out")
    assert set(found) == set(before)
    bound = 1e-5 if before.entries[next(iter(before))].specs["down"].dtype == "F32" else 2e-3
    for target, delta in found.items():
        truth = reference[f"{target}.weight"].double().numpy()
        assert np.linalg.norm(delta - truth) <= bound * np.linalg.norm(truth), target


@pytest.mark.parametrize("name", [*UNIFORM[:-1], "peft/dora"])
def test_peft_comes_back_bit_for_bit(samples: Samples, tmp_path: Path, name: str) -> None:
    before = load(samples(name))
    after = written(written(before, tmp_path / "there"), tmp_path / "back", "peft")
    assert after.config == before.config
    for target, update in before.items():
        assert after[target].scale == update.scale
        for slot, tensor in update.parameters().items():
            assert torch.equal(after[target].parameters()[slot], tensor)


@pytest.mark.parametrize("name", ["llama_lora", "llama_lora_all", "llama_dora", "gemma3_text"])
def test_mlx_comes_back_bit_for_bit(samples: Samples, tmp_path: Path, name: str) -> None:
    source = samples(f"mlx/{name}")
    there = written(load(source), tmp_path / "there", "peft")
    assert there.format.name == "peft"
    written(there, tmp_path / "back")
    assert config_of(tmp_path / "back") == config_of(source)
    before, after = (load_file(folder / "adapters.safetensors") for folder in (source, tmp_path / "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_config_covers_the_targets(samples: Samples, tmp_path: Path) -> None:
    written(load(samples("peft/lora_embedding")), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == -1
    assert config["lora_parameters"]["keys"] == ["model.embed_tokens", "self_attn.q_proj"]
    with safe_open(tmp_path / "out" / "adapters.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "mlx"


def test_ranks_and_scales_become_one(samples: Samples, tmp_path: Path) -> None:
    """The scale is that of most targets, whose factors stay as they are."""
    before = load(samples("peft/rank_alpha_pattern"))
    result, report = convert(before, "mlx")
    assert {"W_RANK_PADDED", "W_SCALE_FOLDED"} <= set(report.notices)
    (scale,) = {e.scale for e in result.entries.values()}
    (rank,) = {e.rank for e in result.entries.values()}
    assert rank == max(e.rank for e in before.entries.values())
    for target, entry in before.entries.items():
        ups = [a[target].parameters()["up"] for a in (before, result)]
        assert torch.equal(ups[0], ups[1][:, : entry.rank]) == (entry.scale == scale)
        assert not ups[1][:, entry.rank :].any()


def test_magnitudes_keep_the_delta(samples: Samples, tmp_path: Path) -> None:
    source = samples("peft/dora")
    base, reference = load_base(source / "base.safetensors"), load_file(source / "reference_dW.safetensors")
    after = written(load(source), tmp_path / "out")
    assert config_of(tmp_path / "out")["fine_tune_type"] == "dora"
    for target, update in after.items():
        truth = reference[f"{target}.weight"]
        delta = update.delta(base.find(f"{target}.weight", tuple(truth.shape)))
        assert torch.linalg.norm(delta - truth) <= 1e-5 * torch.linalg.norm(truth)


class TestRefusals:
    def test_convolutions(self, samples: Samples) -> None:
        with pytest.raises(UnsupportedInTargetError, match="matrices only"):
            convert(load(samples("peft/lora_conv2d")), "mlx")

    def test_image_models(self, samples: Samples) -> None:
        with pytest.raises(UnmappedModuleError, match="part of an image model"):
            convert(load(samples("diffusers/flux_lora") / "pytorch_lora_weights.safetensors"), "mlx")

    def test_whole_layers(self, samples: Samples) -> None:
        with pytest.raises(UnsupportedInTargetError, match="9 whole parameters"):
            convert(load(samples("mlx/llama_full")), "peft")

    def test_magnitudes_of_some(self, samples: Samples, tmp_path: Path) -> None:
        source = samples("peft/dora")
        tensors = load_file(source / "adapter_model.safetensors")
        del tensors[next(key for key in tensors if "magnitude" in key)]
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
        with pytest.raises(UnsupportedInTargetError, match="DoRA for all targets or for none"):
            convert(load(tmp_path), "mlx")

    def test_magnitudes_of_columns(self, tmp_path: Path) -> None:
        """PEFT's run along the columns of an embedding, MLX-LM's along its rows."""
        stem = "base_model.model.model.embed_tokens.lora_"
        shapes = {"embedding_A": (2, 7), "embedding_B": (5, 2), "magnitude_vector": (5,)}
        save_file({stem + key: torch.randn(*s) for key, s in shapes.items()}, tmp_path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True, "target_modules": ["embed_tokens"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedInTargetError, match="a magnitude per column of an embedding"):
            convert(load(tmp_path), "mlx")

    def test_bias(self, samples: Samples) -> None:
        with pytest.raises(UnsupportedInTargetError, match="--drop bias"):
            convert(load(samples("peft/lora_bias_true")), "mlx")
