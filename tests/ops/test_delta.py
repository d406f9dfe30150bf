"""Dense updates against the true deltas of the real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import AdapterError, NeedsBaseError, OutputError

CASES = [
    "peft/lora_plain",
    "peft/rslora",
    "peft/rank_alpha_pattern",
    "peft/dora",
    "peft/bias_lora_only",
    "peft/lora_bias_true",
    "peft/modules_to_save",
    "peft/lora_embedding_saved",
    "peft/lora_conv2d",
    "peft/moe_target_parameters",
    "lycoris/locon",
    "lycoris/locon_dora",
    "lycoris/locon_tucker",
]


@pytest.mark.parametrize("case", CASES)
def test_with_its_base_every_changed_parameter_equals_the_reference(samples, tmp_path: Path, case: str) -> None:  # type: ignore[no-untyped-def]
    folder = samples(case)
    file = folder / "adapter.safetensors"
    adapter = loratools.load(file if file.exists() else folder)
    out = tmp_path / "deltas.safetensors"
    report = loratools.delta_file(adapter, out, base=loratools.load_base(folder / "base.safetensors"))
    ours, truth = load_file(out), load_file(folder / "reference_dW.safetensors")
    changed = {name for name, value in truth.items() if value.abs().max() > 0}
    assert changed <= set(ours)
    for name, value in ours.items():
        wanted = truth.get(name, torch.zeros_like(value))
        assert value.dtype == torch.float32
        assert value.shape == wanted.shape
        assert float((value - wanted).norm()) <= 1e-5 * max(float(wanted.norm()), 1e-3), name
    assert set(report.parameters) == set(ours)
    assert not report.skipped


def test_without_a_base_names_are_the_adapters_and_replacements_are_listed(samples, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = samples("peft/modules_to_save")
    report = loratools.delta_file(loratools.load(folder), tmp_path / "d.safetensors")
    assert set(report.parameters) == {"lin0.weight"}
    assert set(report.skipped) == {"base_model.model.head.weight", "base_model.model.head.bias"}
    with pytest.raises(OutputError, match="--force"):
        loratools.delta_file(loratools.load(folder), tmp_path / "d.safetensors")


def test_dora_needs_its_base(samples) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NeedsBaseError, match=r"q_proj|up_proj"):
        list(loratools.delta(loratools.load(samples("peft/dora"))))


def test_a_wrong_base_is_named(samples, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 3)}, tmp_path / "base.safetensors")
    base = loratools.load_base(tmp_path / "base.safetensors")
    with pytest.raises(AdapterError, match=r"q_proj.*is it the right base"):
        list(loratools.delta(loratools.load(samples("peft/lora_plain")), base=base))


def test_target_pattern_selects(samples) -> None:  # type: ignore[no-untyped-def]
    adapter = loratools.load(samples("peft/lora_plain"))
    names = [name for name, _ in loratools.delta(adapter, target="layers.1.*.q_proj")]
    assert names == ["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(AdapterError, match="no target matches"):
        list(loratools.delta(adapter, target="nothing"))


def test_experts_follow_a_base_that_stores_them_transposed(samples, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = samples("peft/moe_target_parameters")
    truth = load_file(folder / "reference_dW.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({name: torch.zeros_like(truth[name]).mT.contiguous()}, tmp_path / "base.safetensors")
    deltas = loratools.delta(
        loratools.load(folder),
        base=loratools.load_base(tmp_path / "base.safetensors"),
        target="layers.0.mlp.experts.down_proj",
    )
    assert torch.allclose(dict(deltas)[name], truth[name].mT, atol=1e-6)
