"""PETL-ViT's files as adapters: the delta of the authors' forward, the head, and what is no update."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import petl_files
import pytest
import torch
from safetensors.torch import save_file

from loratools import convert_file, delta, info, load, load_base
from loratools.errors import NotAWeightDeltaError, UnsupportedInTargetError
from loratools.formats.petl import PetlVit
from loratools.ops.convert import Convert
from loratools.quant.petl import fake_quantise
from loratools.storage.petl import PetlModel, write_petl


def test_queries_and_values_are_loras_with_the_scale_of_the_yaml(tmp_path: Path) -> None:
    path, tensors = petl_files.write(tmp_path, "lora", bits=2, dim=4, scale=10.0)
    adapter = load(path)
    assert isinstance(adapter.format, PetlVit)
    assert len(adapter) == 24
    assert set(adapter.extras) == {"head.weight", "head.bias"}
    assert not adapter.warnings
    for target in ("blocks.0.attn.lora_q", "blocks.11.attn.lora_v"):
        down, up = (tensors[f"{target}.adapter_{part}.weight"].astype(np.float64) for part in ("down", "up"))
        truth = 10.0 * up @ down
        found = adapter[target].delta().double().numpy()
        assert np.linalg.norm(found - truth) < 1e-6 * np.linalg.norm(truth)
    head = adapter.extras["head.weight"].read().numpy()
    assert np.array_equal(head, tensors["head.weight"])
    report = info(adapter)
    assert (report.container, report.format, report.codings) == ("petl-vit", "petl-vit", {"2-bit petl": 48})


def test_conversion_to_peft_keeps_the_delta_and_loses_no_head_in_silence(tmp_path: Path) -> None:
    path, _ = petl_files.write(tmp_path, "lora-bihead", scale=0.01)
    with pytest.raises(UnsupportedInTargetError, match=r"head\.weight; pass --drop extras"):
        convert_file(load(path), tmp_path / "out", "peft")
    saved, report = convert_file(load(path), tmp_path / "out", "peft", Convert(drop=frozenset({"extras"})))
    assert "head.weight" in report.dropped
    converted = load(saved.path)
    before = load(path)
    for layer in range(12):
        for old, new in (("q", "q_proj"), ("v", "v_proj")):
            found = converted[f"vit.layers.{layer}.attention.{new}"].delta()
            torch.testing.assert_close(found, before[f"blocks.{layer}.attn.lora_{old}"].delta(), rtol=1e-6, atol=1e-9)


def test_base_weights_go_by_their_names_in_the_hub(tmp_path: Path) -> None:
    path, _ = petl_files.write(tmp_path, "lora")
    names = [f"encoder.layer.{i}.attention.attention.{p}.weight" for i in range(12) for p in ("query", "key", "value")]
    save_file({name: torch.zeros(768, 768) for name in names[:3]}, tmp_path / "vit.safetensors")
    base = load_base(tmp_path / "vit.safetensors")
    found = dict(delta(load(path), base=base, target="blocks.0.attn.lora_v"))
    assert list(found) == ["encoder.layer.0.attention.attention.value.weight"]


def test_adaptformer_is_named_for_what_it_is(tmp_path: Path) -> None:
    path, _ = petl_files.write(tmp_path, "adaptformer")
    adapter = load(path)
    assert not adapter.entries
    assert len(adapter.unsupported) == 24
    assert len(adapter.extras) == 26
    why = "a bottleneck adapter with a ReLU, which is not an update of a weight"
    assert set(info(adapter).unsupported.values()) == {why}
    with pytest.raises(NotAWeightDeltaError, match=r"nonlinear bottlenecks \(PETL-ViT AdaptFormer\)"):
        convert_file(adapter, tmp_path / "out", "peft")


def test_a_yaml_from_elsewhere_can_be_named(tmp_path: Path) -> None:
    path, _ = petl_files.write(tmp_path, "lora", scale=2.0)
    there = path.with_suffix(".yaml").rename(tmp_path / "settings.yaml")
    adapter = load(path, petl=there)
    assert {entry.scale for entry in adapter.entries.values()} == {2.0}


def test_what_was_trained_rounded_is_what_the_file_holds(tmp_path: Path) -> None:
    """Weights behind the rounded ones go into the file, not those, whose deviation is another."""
    model = PetlModel("lora-bihead", 1, 2, 3, 1.0, "toy")
    generator = torch.Generator().manual_seed(0)
    latent = {name: torch.randn(shape, generator=generator) for name, shape, _ in model.coded()}
    rounded = {name: fake_quantise(tensor, 1) for name, tensor in latent.items()}
    write_petl(tmp_path / "latent.bin", latent, model)
    write_petl(tmp_path / "rounded.bin", rounded, model)
    target = "blocks.3.attn.lora_q"
    wanted = rounded[f"{target}.adapter_up.weight"].double() @ rounded[f"{target}.adapter_down.weight"].double()
    found = {name: load(tmp_path / f"{name}.bin")[target].delta().double() for name in ("latent", "rounded")}
    assert float((found["latent"] - wanted).norm()) < 1e-6 * float(wanted.norm())
    assert float((found["rounded"] - wanted).norm()) > 0.1 * float(wanted.norm())


def test_tensors_of_the_modules_alone_have_no_scale(tmp_path: Path) -> None:
    _, tensors = petl_files.write(tmp_path, "lora")
    save_file({name: torch.from_numpy(t.copy()) for name, t in tensors.items()}, tmp_path / "state.safetensors")
    adapter = load(tmp_path / "state.safetensors")
    assert isinstance(adapter.format, PetlVit)
    assert adapter.warnings == ("no scale is stated, so norms are for scale 1; its YAML has it",)
