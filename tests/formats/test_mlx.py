"""MLX-LM: every kind of layer by the formula, the scale of old configs, and writing in its own dialect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats.made import assert_close, f64, rand, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratools
from loratools.base_weights import load_base
from loratools.errors import InputError, OutputError
from loratools.files import load, save

Samples = Callable[[str], Path]


def config(**parameters: Any) -> dict[str, Any]:
    return {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}


STACK = "model.layers.0.mlp.switch_mlp.up_proj"


def test_each_layer_by_its_formula(tmp_path: Path) -> None:
    linear, embedding = (rand(0, 7, 3), rand(1, 3, 5)), (rand(2, 11, 3), rand(3, 3, 6))
    experts = rand(4, 4, 3, 7), rand(5, 4, 5, 3)
    tensors = {"model.layers.0.mlp.up_proj": linear, "model.embed_tokens": embedding, STACK: experts}
    files = {f"{name}.lora_{side}": t for name, pair in tensors.items() for side, t in zip("ab", pair, strict=True)}
    write(tmp_path, "adapters.safetensors", files, config(rank=3, scale=2.5))
    adapter = load(tmp_path)
    assert_close(adapter["model.layers.0.mlp.up_proj"].delta(), 2.5 * (f64(linear[0]) @ f64(linear[1])).T)
    assert_close(adapter["model.embed_tokens"].delta(), 2.5 * f64(embedding[0]) @ f64(embedding[1]))
    stack = np.stack([2.5 * f64(b) @ f64(a) for a, b in zip(*experts, strict=True)])
    assert_close(adapter[STACK].delta(), stack)
    assert {e.rank for e in adapter.entries.values()} == {3}


@pytest.mark.parametrize("name", ["model.layers.0.q", "model.embed_tokens"])
def test_magnitudes_are_of_rows(tmp_path: Path, name: str) -> None:
    """Also of an embedding, whose columns they are in PEFT."""
    a, b, m, base = rand(0, 7, 3), rand(1, 3, 5), rand(2, 7 if "embed" in name else 5), rand(3, 7, 5)
    base = base if "embed" in name else base.T.contiguous()
    tensors = {f"{name}.lora_a": a, f"{name}.lora_b": b, f"{name}.m": m}
    write(tmp_path, "adapters.safetensors", tensors, config(rank=3, scale=0.5) | {"fine_tune_type": "dora"})
    low = 0.5 * f64(a) @ f64(b)
    v = f64(base) + (low if "embed" in name else low.T)
    truth = f64(m)[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True) - f64(base)
    assert_close(load(tmp_path)[name].delta(base), truth)


def test_an_embedding_of_another_name_is_known_by_the_base(tmp_path: Path) -> None:
    a, b = rand(0, 7, 3), rand(1, 3, 5)
    write(tmp_path, "adapters.safetensors", {"table.lora_a": a, "table.lora_b": b}, config(rank=3, scale=1.0))
    save_file({"table.weight": rand(2, 7, 5)}, tmp_path / "base.safetensors")
    base = load_base(tmp_path / "base.safetensors")
    assert_close(load(tmp_path, base=base)["table"].delta(), f64(a) @ f64(b))
    assert_close(load(tmp_path)["table"].delta(), (f64(a) @ f64(b)).T)


@pytest.mark.parametrize(
    ("parameters", "alpha", "scale", "warning"),
    [
        ({"rank": 3, "scale": 7.0}, None, 7.0, None),
        ({"rank": 3, "scale": 7.0}, 6.0, 7.0, "the alpha given is ignored"),
        ({"rank": 3, "alpha": 6.0}, None, 2.0, None),
        ({"rank": 3}, None, 20.0, "states no scale"),
        ({"rank": 3}, 6.0, 2.0, None),
    ],
)
def test_the_scale_of_old_configs(
    tmp_path: Path, parameters: dict[str, Any], alpha: float | None, scale: float, warning: str | None
) -> None:
    tensors = {"q.lora_a": rand(0, 7, 3), "q.lora_b": rand(1, 3, 5)}
    write(tmp_path, "adapters.safetensors", tensors, config(**parameters))
    adapter = load(tmp_path, alpha=alpha)
    assert adapter.entries["q"].scale == scale
    assert [warning in text for text in adapter.warnings] == ([True] if warning else [])


def test_without_a_config_alpha_is_open(tmp_path: Path) -> None:
    path = write(tmp_path, "adapters.safetensors", {"q.lora_a": rand(0, 7, 3), "q.lora_b": rand(1, 3, 5)})
    assert "state it with --alpha" in load(path).warnings[0]
    assert load(path, alpha=6).entries["q"].scale == 2.0
    bad = config(rank=3, scale="2")
    write(tmp_path, "adapters.safetensors", {"q.lora_a": rand(0, 7, 3), "q.lora_b": rand(1, 3, 5)}, bad)
    with pytest.raises(InputError, match="scale is '2', not a number"):
        load(tmp_path)


def test_squeezed_files_are_what_mlx_reads(samples: Samples, tmp_path: Path) -> None:
    """One rank, one scale, the names and shapes of before, and the optimum of that rank."""
    source = samples("mlx/llama_lora")
    loratools.squeeze_file(load(source), tmp_path / "out", 2)
    made = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    before = json.loads((source / "adapter_config.json").read_text())
    assert made["lora_parameters"] == before["lora_parameters"] | {"rank": 2}
    assert {k: v for k, v in made.items() if k != "lora_parameters"} == {
        k: v for k, v in before.items() if k != "lora_parameters"
    }
    old, new = (load_file(folder / "adapters.safetensors") for folder in (source, tmp_path / "out"))
    assert set(old) == set(new)
    with safe_open(tmp_path / "out" / "adapters.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "mlx"
    for name in {key.rpartition(".")[0] for key in old}:
        full, low = (2.5 * f64(t[f"{name}.lora_a"]) @ f64(t[f"{name}.lora_b"]) for t in (old, new))
        values = np.linalg.svd(full, compute_uv=False)
        assert new[f"{name}.lora_a"].shape[1] == 2
        assert np.linalg.norm(full - low) == pytest.approx(np.linalg.norm(values[2:]), rel=1e-5)


def test_ranks_that_differ_have_no_place(samples: Samples, tmp_path: Path) -> None:
    adapter = load(samples("mlx/llama_lora"))
    with pytest.raises(OutputError, match="one rank and one scale"):
        loratools.squeeze_file(adapter, tmp_path / "out", loratools.Energy(0.7))
    assert not (tmp_path / "out").exists()


def test_whole_layers_come_back(samples: Samples, tmp_path: Path) -> None:
    source = samples("mlx/llama_full")
    save(load(source), tmp_path / "out")
    before, after = (load_file(folder / "adapters.safetensors") for folder in (source, tmp_path / "out"))
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_experts_come_back(tmp_path: Path) -> None:
    tensors = {f"{STACK}.lora_a": rand(0, 4, 3, 7), f"{STACK}.lora_b": rand(1, 4, 5, 3)}
    write(tmp_path / "in", "adapters.safetensors", tensors, config(rank=3, scale=1.0))
    save(load(tmp_path / "in"), tmp_path / "out")
    after = load_file(tmp_path / "out" / "adapters.safetensors")
    assert set(after) == set(tensors)
    assert all(torch.equal(tensors[key], after[key]) for key in after)


def test_the_command_line_squeezes_into_a_folder_beside(samples: Samples, tmp_path: Path) -> None:
    from loratools_cli.app import main

    shutil.copytree(samples("mlx/llama_lora"), tmp_path / "mine")
    assert main(["squeeze", str(tmp_path / "mine"), "--rank", "2", "-q"]) == 0
    assert {p.name for p in (tmp_path / "mine.r2").iterdir()} == {"adapter_config.json", "adapters.safetensors"}
    assert {e.rank for e in load(tmp_path / "mine.r2").entries.values()} == {2}
