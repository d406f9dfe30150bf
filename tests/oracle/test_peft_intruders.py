"""PEFT's own search for intruders, and its mitigation, on a tiny model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

if not os.environ.get("CI"):  # where it must be installed, its absence is an error
    pytest.importorskip("peft", reason="compares with PEFT: pip install 'loratools[oracle]'")

import peft
from peft.tuners.lora.intruders import reduce_intruder_dimension

import loratools


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(20, 34, bias=False)
        self.tall = nn.Linear(34, 24, bias=False)


@pytest.mark.parametrize("strength", [0.0, 0.75])
def test_peft_finds_and_mitigates_the_same(tmp_path: Path, strength: float) -> None:
    torch.manual_seed(0)
    net = Net()
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["wide", "tall"], init_lora_weights=False)
    model = peft.get_peft_model(net, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 8
    model.save_pretrained(tmp_path / "adapter")
    told: list[str] = []
    reduce_intruder_dimension(model, mitigation_lambda=strength, logging_sink=told.append)
    theirs = {line.split(":")[0].rpartition(".")[2]: line for line in told if "ntruders" in line}
    adapter, base = loratools.load(tmp_path / "adapter"), loratools.load_base(tmp_path / "base.safetensors")
    report = loratools.intruders(adapter, base)
    assert report.total["left"] > 0
    for name, found in report.targets.items():
        said = f"Intruders: {found.left.count}" if found.left.count else "No intruders"
        assert theirs[name.removesuffix(".weight")].endswith(said)
    ours, _ = loratools.mitigate(adapter, base, strength, keep_rank=True)
    for target, update in ours.items():
        delta = getattr(model.base_model.model, target).get_delta_weight("intruder_reduced")
        assert (update.delta() - delta).norm() <= 1e-4 * delta.norm()
