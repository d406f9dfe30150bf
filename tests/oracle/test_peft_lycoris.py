"""PEFT itself loads the LoHa and LoKr that a conversion wrote from LyCORIS, and merges the delta of LyCORIS."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

if not os.environ.get("CI"):  # where it must be installed, its absence is an error
    pytest.importorskip("peft", reason="compares with PEFT: pip install 'loratools[oracle]'")

import peft

from loratools.files import load
from loratools.ops.convert import convert_file

Samples = Callable[[str], Path]


def model_of(shapes: dict[str, torch.Size]) -> nn.Module:
    """Layers under these names with weights of these shapes."""
    model = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        layer = (
            nn.Linear(shape[1], shape[0], bias=False)
            if len(shape) == 2
            else nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), bias=False)
        )
        parent.add_module(leaf, layer)
    return model


@pytest.mark.parametrize("name", ["loha", "lokr", "lokr_full_matrix", "lokr_scaled", "lokr_tucker"])
def test_peft_merges_what_lycoris_trained(samples: Samples, tmp_path: Path, name: str) -> None:
    adapter = load(samples(f"lycoris/{name}") / "adapter.safetensors")
    convert_file(adapter, tmp_path / "out", "peft")
    reference = load_file(samples(f"lycoris/{name}") / "reference_dW.safetensors")
    converted = load(tmp_path / "out")
    flat = {parameter.removesuffix(".weight").replace(".", "_"): delta for parameter, delta in reference.items()}
    truths = {target: flat[target.replace(".", "_")] for target in converted}
    model = model_of({target: truth.shape for target, truth in truths.items()})
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "out")).merge_and_unload()
    for target, truth in truths.items():
        delta = merged.get_parameter(f"{target}.weight") - before[f"{target}.weight"]
        assert torch.linalg.norm(delta - truth) <= 1e-5 * torch.linalg.norm(truth), target
