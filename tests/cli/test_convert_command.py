"""`loratools convert`: where it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import petl_files
import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.ops.lowering import Lowering

Run = Callable[..., Any]
Make = Callable[..., Path]


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """A kohya file with a fused projection."""
    generator = torch.Generator().manual_seed(0)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 8, generator=generator),
        f"{name}.lora_up.weight": torch.randn(24, 4, generator=generator),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "flux.safetensors")
    return tmp_path / "flux.safetensors"


@pytest.fixture
def loha(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 10), "hada_w2_a": (12, 2), "hada_w2_b": (2, 10)}
    stem = "lora_unet_double_blocks_0_img_mlp_0"
    save_file(
        {f"{stem}.{slot}": torch.randn(*shape, generator=generator) for slot, shape in shapes.items()},
        tmp_path / "loha.safetensors",
    )
    return tmp_path / "loha.safetensors"


def test_it_writes_what_the_library_makes_beside_the_input(run: Run, flux: Path) -> None:
    done = run("convert", flux, "--to", "diffusers", "--json")
    assert (done.code, done.err) == (0, "")
    _, report = loratools.convert(loratools.load(flux), "diffusers")
    assert done.json["targets"] == json.loads(json.dumps(report.to_dict()["targets"]))
    place = flux.with_name("flux.diffusers.safetensors")
    assert done.json["output"] == str(place)
    written, wanted = loratools.load(place), loratools.convert(loratools.load(flux), "diffusers")[0]
    assert loratools.diff(written, wanted, tolerance=1e-12).same


def test_the_summary_accounts_for_targets_and_keys(run: Run, flux: Path) -> None:
    done = run("convert", flux, "--to", "diffusers")
    assert done.err == ""  # parts of a projection are nothing to be warned of
    assert done.out.splitlines()[:4] == [
        "kohya -> diffusers (flux)",
        "names: FLUX names",
        "keys: 2 of updates, 1 scales, 0 carried over, 0 dropped",
        "rewritten: rows of a fused projection, 3 targets",
    ]


def test_an_approximation_shows_its_error(run: Run, loha: Path, tmp_path: Path) -> None:
    refused = run("convert", loha, "--to", "diffusers")
    assert refused.code == 4
    assert "pass --exact for the LoRA of rank 4 that it is exactly" in refused.err
    done = run("convert", loha, "--to", "diffusers", "--rank", 1, "-o", tmp_path / "one.safetensors")
    _, report = loratools.convert(loratools.load(loha), "diffusers", loratools.Convert(Lowering(rank=1)))
    (row,) = report.targets.values()
    assert row.relative_error is not None
    assert f"relative error: {row.relative_error:.3g} for 1 approximated targets" in done.out
    exact = run("convert", loha, "--to", "diffusers", "--exact", "-o", tmp_path / "all.safetensors")
    assert exact.code == 0
    assert "relative error" not in exact.out
    (written,), (was,) = loratools.load(tmp_path / "all.safetensors").values(), loratools.load(loha).values()
    torch.testing.assert_close(written.delta(), was.delta(), rtol=1e-5, atol=1e-6)


def test_a_dry_run_writes_nothing(run: Run, flux: Path) -> None:
    done = run("convert", flux, "--to", "comfy", "--dry-run")
    assert done.code == 0
    assert "was not written" in done.out
    assert sorted(p.name for p in flux.parent.iterdir()) == [flux.name]


def test_nothing_is_overwritten(run: Run, flux: Path) -> None:
    assert run("convert", flux, "--to", "comfy").code == 0
    again = run("convert", flux, "--to", "comfy")
    assert again.code == 5
    assert "--force" in again.err
    assert run("convert", flux, "--to", "comfy", "--force").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "onnx"), "the dialects that can be written are"),
        (("--to", "comfy", "--drop", "alphas"), "what can be dropped is"),
        (("--to", "comfy", "--rank", 2, "--energy", 0.5), "exclude each other"),
        (("--to", "comfy", "--rank", 0), "below 1"),
        (("--to", "comfy", "--energy", 1.5), "not a share"),
        (("--to", "comfy", "--dtype", "q8_0"), "q8_0 is for GGUF"),
    ],
)
def test_wrong_arguments_are_named(run: Run, flux: Path, arguments: tuple[object, ...], message: str) -> None:
    done = run("convert", flux, *arguments)
    assert done.code == 2
    assert message in done.err
    assert sorted(p.name for p in flux.parent.iterdir()) == [flux.name]


def test_initial_factors_are_subtracted(run: Run, peft: Make, tmp_path: Path) -> None:
    after, before = peft("after", seed=1, init_lora_weights="pissa"), peft("before", seed=2)
    refused = run("convert", after, "--to", "kohya", "-o", tmp_path / "out.safetensors")
    assert refused.code == 4
    assert "--initial-adapter" in refused.err
    done = run("convert", after, "--to", "kohya", "--initial-adapter", before, "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    wanted = loratools.subtract_initial(loratools.load(after), loratools.load(before))
    found = loratools.load(tmp_path / "out.safetensors")
    for (_, update), again in zip(wanted.items(), found.values(), strict=True):
        torch.testing.assert_close(again.delta(), update.delta(), rtol=1e-5, atol=1e-5)


def test_a_binary_adapter_of_petl_vit_goes_by_its_yaml(run: Run, tmp_path: Path) -> None:
    path, _ = petl_files.write(tmp_path / "models_bin" / "lora", "lora")
    refused = run("convert", path, "--to", "peft", "-o", tmp_path / "out")
    assert refused.code == 4
    assert "head.weight; pass --drop extras" in refused.err
    assert run("convert", path, "--to", "peft", "--drop", "extras", "-o", tmp_path / "out").code == 0
    assert len(loratools.load(tmp_path / "out")) == 24
    bottleneck, _ = petl_files.write(tmp_path / "models_bin" / "adaptformer", "adaptformer")
    assert "a bottleneck adapter with a ReLU" in run("info", bottleneck).out.replace("\n", " ")
    refused = run("convert", bottleneck, "--to", "peft", "-o", tmp_path / "other")
    assert (refused.code, refused.err.count("\n")) == (4, 1)
    assert "holds nonlinear bottlenecks (PETL-ViT AdaptFormer)" in refused.err
    there = path.with_suffix(".yaml").rename(tmp_path / "elsewhere.yaml")
    again = run("convert", path, "--petl", there, "--to", "peft", "--drop", "extras", "-o", tmp_path / "given")
    assert again.code == 0
    one, two = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "given"))
    assert one.read_bytes() == two.read_bytes()
    assert "petl-vit" in run("info", path, "--petl", there).out
    assert run("info", path, "--petl", tmp_path / "missing.yaml").code == 3
    lost = run("info", path)
    assert (lost.code, lost.err.count("\n")) == (3, 1)
    assert "put its YAML beside it or name it with --petl (toy-bit1-dim2.yaml" in lost.err
