"""PEFT's routers: the classifier of X-LoRA, and the prototypes of Arrow."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

if not os.environ.get("CI"):  # where it must be installed, its absence is an error
    pytest.importorskip("peft", reason="compares with PEFT: pip install 'loratools[oracle]'")

from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from peft.tuners.xlora.classifier import XLoraClassifier
from peft.tuners.xlora.config import XLoraConfig

from loratools import load
from loratools.ops.mixture import routing_prototypes
from loratools.ops.routing import load_routing

MODEL = torch.nn.Linear(1, 1)  # of which the classifier takes the dtype


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("layerwise", [True, False])
def test_a_classifier_of_xlora_routes_as_its_biases_say(tmp_path: Path, depth: int, layerwise: bool) -> None:
    torch.manual_seed(0)
    names = {"a": "a", "b": "b", "c": "c"}
    config = XLoraConfig(hidden_size=6, adapters=names, xlora_depth=depth, layerwise_scalings=layerwise, xlora_size=5)
    classifier = XLoraClassifier(MODEL, config, n_classes=3, n_layers=4, device=torch.device("cpu"))
    for name, parameter in classifier.named_parameters():  # so that all but the last layer gives zero for zero
        if name.endswith("bias") and parameter.numel() not in (3, 12):
            torch.nn.init.zeros_(parameter)
    stem = "base_model.internal_xlora_classifier."
    save_file({stem + name: tensor for name, tensor in classifier.state_dict().items()}, tmp_path / "x.safetensors")
    with torch.no_grad():
        logits = classifier.layers(torch.zeros(1, 6)).reshape(-1, 3)
    found = load_routing(tmp_path / "x.safetensors", 3).shares
    assert found.shape == (1, 4 if layerwise else 1, 3)
    assert torch.allclose(found[0], logits.double().softmax(dim=1), atol=1e-6)


def test_prototypes_are_those_of_arrow(tmp_path: Path) -> None:
    adapters, want = [], []
    settings = ArrowConfig(rng_seed=0)
    settings.task_adapter_names, settings.gks_adapter_names = ["task_0"], []
    arrow = ArrowLoraLinearLayer(12, settings)
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        a, b = torch.randn(3, 12, generator=generator), torch.randn(9, 3, generator=generator)
        folder = tmp_path / f"e{i}"
        folder.mkdir()
        stem = "base_model.model.model.layers.0.q_proj"
        save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        adapters.append(load(folder))
        want.append(arrow.top_right_singular_vec_from_BA(a, b, iters=300))
    ((_, found),) = routing_prototypes(adapters)
    cosines = (found * torch.stack(want).double()).sum(dim=1).abs()
    assert torch.allclose(cosines, torch.ones(2).double(), atol=1e-5)
