"""AdapterHub: merged projections, (IA)^3, names below a head, and what is no update of a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.made import assert_close, f64, rand, write

import loratools
from loratools.errors import AdapterError
from loratools.files import load
from loratools.ops.convert import convert

QUERY = "encoder.layer.0.attention.self.query"


def config(kind: str = "bert", of: str = "BertModel", **fields: Any) -> dict[str, Any]:
    inner = {"architecture": "lora", "alpha": 8, "r": 2, "composition_mode": "add", "attn_matrices": ["q", "v"]}
    return {"config": inner | fields, "model_type": kind, "model_class": of, "name": "task", "hidden_size": 16}


def pair(target: str, rows: int = 6, rank: int = 2) -> dict[str, Any]:
    return {f"{target}.loras.task.lora_A": rand(0, rank, 5), f"{target}.loras.task.lora_B": rand(1, rows, 2)}


@pytest.mark.parametrize("name", ["adapter.safetensors", "pytorch_adapter.bin"])
def test_lora(tmp_path: Path, name: str) -> None:
    tensors = pair(QUERY)
    write(tmp_path, name, tensors, config())
    a, b = tensors.values()
    assert_close(load(tmp_path)[QUERY].delta(), 4.0 * f64(b) @ f64(a))


@pytest.mark.parametrize(
    ("kind", "of", "target", "name"),
    [
        ("bert", "BertModel", QUERY, QUERY),
        ("bert", "BertAdapterModel", QUERY, f"bert.{QUERY}"),
        ("roberta", "RobertaForMaskedLM", QUERY, f"roberta.{QUERY}"),
        ("llama", "LlamaForCausalLM", "layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("llama", "LlamaModel", "layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"),
    ],
)
def test_names_below_a_head_are_completed(tmp_path: Path, kind: str, of: str, target: str, name: str) -> None:
    write(tmp_path, "adapter.safetensors", pair(target), config(kind, of))
    assert list(convert(load(tmp_path), "peft")[0]) == [name]


def test_one_projection_of_a_fused_one(tmp_path: Path) -> None:
    """Its shapes alone would be those of a LoRA of some smaller module; GPT-2 keeps the transpose."""
    tensors = pair("h.0.attn.c_attn")
    write(tmp_path, "adapter.safetensors", tensors, config("gpt2", "GPT2Model", attn_matrices=["k"]))
    a, b = (f64(t) for t in tensors.values())
    truth = 4.0 * np.concatenate([np.zeros((6, 5)), b @ a, np.zeros((6, 5))]).T
    adapter = load(tmp_path)
    assert_close(adapter["h.0.attn.c_attn"].delta(), truth)
    made, _ = convert(adapter, "peft")
    assert made.config is not None
    assert made.config["fan_in_fan_out"] is True
    assert_close(made["h.0.attn.c_attn"].delta(), truth)


def test_ia3_scales_the_outputs(tmp_path: Path) -> None:
    factors, base = rand(0, 6, 1), rand(1, 6, 5)
    tensors = {f"{QUERY}.loras.task.lora_B": factors}
    write(tmp_path, "adapter.safetensors", tensors, config(composition_mode="scale", alpha=1, r=1))
    assert_close(load(tmp_path)[QUERY].delta(base), (f64(factors) - 1) * f64(base))
    write(tmp_path, "adapter.safetensors", tensors, config(composition_mode="scale", alpha=2, r=1))
    with pytest.raises(AdapterError, match="alpha of 2 is not supported"):
        load(tmp_path)


def test_variants_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "adapter.safetensors", pair(QUERY) | {f"{QUERY}.loras.task.m.weight": rand(2, 1, 6)}, config())
    with pytest.raises(AdapterError, match=r"loras\.task\.m\.weight belongs to a variant"):
        load(tmp_path)


def test_what_is_gated_is_named(tmp_path: Path) -> None:
    """The gate depends on the input, so there is no delta; modules without one have theirs."""
    gated, plain = QUERY, QUERY.replace("query", "value")
    tensors = pair(gated) | pair(plain) | {f"{gated}.loras.task.gate.weight": rand(2, 1, 5)}
    write(tmp_path, "adapter.safetensors", tensors, config(use_gating=True))
    adapter = load(tmp_path)
    assert list(adapter) == [plain]
    assert set(loratools.info(adapter).unsupported) == {key for key in tensors if key.startswith(gated)}


def test_without_a_config_alpha_is_open(tmp_path: Path) -> None:
    path = write(tmp_path, "adapter.safetensors", pair(QUERY))
    assert "state it with --alpha" in load(path).warnings[0]
    assert load(path, alpha=8).entries[QUERY].scale == 4.0
