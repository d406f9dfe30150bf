"""`loratools fuse`: a base model with an adapter in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Run = Callable[..., Any]
Make = Callable[..., Path]


def base(folder: Path, layers: int = 2) -> Path:
    folder.mkdir()
    modules = ("q_proj", "k_proj", "v_proj")
    names = [f"model.layers.{i}.self_attn.{m}.weight" for i in range(layers) for m in modules]
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(32, 32, generator=generator).bfloat16() for name in names}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_the_sum_is_written_and_said(run: Run, peft: Make, tmp_path: Path) -> None:
    source, model = peft("in", rank=8), base(tmp_path / "base")
    done = run("fuse", model, source, "-o", tmp_path / "out")
    assert done.code == 0
    assert "6 parameters changed by" in done.out
    assert f"wrote {tmp_path / 'out'}: 2 files" in done.out
    stored, before, after = (
        load_file(p)
        for p in (source / "adapter_model.safetensors", model / "model.safetensors", tmp_path / "out/model.safetensors")
    )
    for name, weight in before.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        delta = 2 * stored[f"{stem}.lora_B.weight"].double() @ stored[f"{stem}.lora_A.weight"].double()
        torch.testing.assert_close(after[name].double(), weight.double() + delta, rtol=2**-8, atol=1e-6)
    assert (tmp_path / "out" / "config.json").exists()


def test_json_and_all_name_every_parameter(run: Run, peft: Make, tmp_path: Path) -> None:
    source, model = peft("in"), base(tmp_path / "base")
    report = run("fuse", model, source, "-o", tmp_path / "out", "--json").json
    assert len(report["parameters"]) == 6
    assert 0 < report["total"]["lost"] < 0.1
    shown = run("fuse", model, source, "-o", tmp_path / "out2", "--all")
    assert shown.out.count("self_attn") >= 6


def test_nothing_is_overwritten_or_left_behind(run: Run, peft: Make, tmp_path: Path) -> None:
    source, model = peft("in", n_layers=3), base(tmp_path / "base")
    failed = run("fuse", model, source, "-o", tmp_path / "out")
    assert failed.code == 4
    assert "no parameters for 3 of 9 targets" in failed.err
    assert failed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert run("fuse", base(tmp_path / "deep", 3), source, "-o", tmp_path / "out").code == 5
    assert run("fuse", tmp_path / "deep", source, "-o", tmp_path / "out", "--force").code == 0
