"""`loratools delta`: dense updates in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Run = Callable[..., Any]
Make = Callable[..., Path]


def test_the_updates_are_the_products(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in", rank=8)  # scale 2
    done = run("delta", source, "-o", tmp_path / "deltas.safetensors")
    assert done.code == 0
    assert done.out.startswith(f"wrote {tmp_path / 'deltas.safetensors'}: 6 tensors, ")
    stored, written = load_file(source / "adapter_model.safetensors"), load_file(tmp_path / "deltas.safetensors")
    for name, delta in written.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        expected = 2 * stored[f"{stem}.lora_B.weight"].double() @ stored[f"{stem}.lora_A.weight"].double()
        torch.testing.assert_close(delta.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_glob_selects(run: Run, peft: Make, tmp_path: Path) -> None:
    done = run("delta", peft(), "--target", "q_proj", "-o", tmp_path / "q.safetensors", "--all")
    assert done.code == 0
    assert done.out.count("32 x 32") == 2
    assert run("delta", peft("b"), "--target", "nothing", "-o", tmp_path / "n.safetensors").code == 4
    assert not (tmp_path / "n.safetensors").exists()


def test_a_base_gives_its_names(run: Run, kohya: Make, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.{m}.weight" for i in range(2) for m in ("q_proj", "k_proj", "v_proj")]
    save_file({name: torch.randn(32, 32) for name in names}, tmp_path / "base.safetensors")
    out = tmp_path / "d.safetensors"
    assert run("delta", kohya(), "--base", tmp_path / "base.safetensors", "-o", out).code == 0
    assert sorted(load_file(out)) == sorted(names)


def test_the_output_must_be_named_and_free(run: Run, peft: Make, tmp_path: Path) -> None:
    source, out = peft(), tmp_path / "d.safetensors"
    assert run("delta", source).code == 2
    assert run("delta", source, "-o", out, "-q").out == f"{out}\n"
    assert run("delta", source, "-o", out).code == 5
    assert run("delta", source, "-o", out, "--force").code == 0


def test_fused_projections_need_their_flags(run: Run, tmp_path: Path) -> None:
    a, b = torch.randn(4, 6), torch.randn(10, 2)
    source, out = tmp_path / "lora.safetensors", tmp_path / "d.safetensors"
    save_file({"qkv.lora_A": a, "qkv.lora_B": b}, source)
    refused = run("delta", source, "-o", out)
    assert (refused.code, "--enable-lora" in refused.err) == (4, True)
    for wrong in ("1,2,1", "0,0,0", "q,v", ""):
        assert run("delta", source, "-o", out, "--enable-lora", wrong).code == 2
    assert run("delta", source, "-o", out, "--enable-lora", "1,0,1", "--alpha", 4).code == 0
    truth = 2 * torch.cat([b[:5] @ a[:2], torch.zeros(5, 6), b[5:] @ a[2:]])
    torch.testing.assert_close(load_file(out)["qkv.weight"], truth)
