"""A fresh adapter that begins with given deltas, against layers computed by hand in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny import ATTENTION, save_tiny_lora, tiny_llama

from loratools.adapter import Adapter
from loratools.errors import AdapterError
from loratools.files import load
from loratools.training.anneal import lora_layers
from loratools.training.new_adapter import Method, NewAdapter, new_adapter
from loratools.training.start_from import start_from


@pytest.fixture(scope="module")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Of rank 4, scale 2, of all linear layers."""
    return load(save_tiny_lora(tmp_path_factory.mktemp("lora") / "lora"))


def best(adapter: Adapter, target: str, rank: int) -> torch.Tensor:
    """By the full SVD of the dense delta."""
    parameters = adapter[target].parameters()
    dense = 2.0 * parameters["up"].double() @ parameters["down"].double()
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("rank", [2, 4, 9])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_layers_compute_with_weight_and_delta(deltas: Adapter, method: Method, rank: int, alpha: float | None) -> None:
    model = new_adapter(tiny_llama(seed=5), NewAdapter(method, rank, alpha), seed=0)
    assert start_from(model, deltas) == ()
    layers = dict(lora_layers(model.get_base_model()))
    assert layers.keys() == deltas.keys()
    for target, layer in layers.items():
        weight = layer.get_base_layer().weight.detach().double()
        wanted = best(deltas, target, rank)
        x = torch.randn(7, weight.shape[1], generator=torch.Generator().manual_seed(0))
        found = layer(x).detach().double()
        assert torch.allclose(found, x.double() @ (weight + wanted).T, atol=1e-5), target
        down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        k = min(rank, 4)
        assert torch.allclose(down[:k].norm(dim=1), up[:, :k].norm(dim=0), rtol=1e-4)
        assert not up[:, k:].any()
        assert bool((down[k:].norm(dim=1) > 0).all())  # fresh: it can be trained


def test_a_layer_without_a_delta_starts_afresh(tmp_path: Path) -> None:
    some = load(save_tiny_lora(tmp_path / "lora", modules=ATTENTION))
    fresh = new_adapter(tiny_llama(), NewAdapter(rank=2), seed=0)
    model = new_adapter(tiny_llama(), NewAdapter(rank=2), seed=0)
    start_from(model, some)
    before = dict(lora_layers(fresh.get_base_model()))
    for target, layer in lora_layers(model.get_base_model()):
        same = torch.equal(layer.lora_A["default"].weight, before[target].lora_A["default"].weight)
        assert same == ("mlp" in target)
        assert bool(layer.lora_B["default"].weight.any()) == ("mlp" not in target)


def test_targets_without_a_layer_are_told(deltas: Adapter) -> None:
    model = new_adapter(tiny_llama(), NewAdapter(rank=2, targets=("q_proj",)), seed=0)
    left = start_from(model, deltas)
    assert set(left) == {target for target in deltas if "q_proj" not in target}


def test_a_delta_of_another_shape_changes_nothing(deltas: Adapter) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    wide: Any = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    )
    model = new_adapter(wide, NewAdapter(rank=2), seed=0)
    with pytest.raises(AdapterError, match=r"mlp\.\w+: a delta of .* does not fit"):
        start_from(model, deltas)
    assert not any(layer.lora_B["default"].weight.any() for _, layer in lora_layers(model))
