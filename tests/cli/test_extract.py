"""`loratools extract`: a LoRA of a full fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Run = Callable[..., Any]


def two(tmp_path: Path) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.q_proj.weight": torch.randn(16, 12, generator=generator) for i in range(3)}
    base["norm.weight"] = torch.ones(12)
    save_file(base, tmp_path / "base.safetensors")
    for tensor in base.values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    save_file(base, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def test_an_adapter_is_written(run: Run, tmp_path: Path) -> None:
    base, tuned = two(tmp_path)
    done = run("extract", base, tuned, "--rank", 12, "-o", tmp_path / "out")
    assert done.code == 0
    assert "3 matrices, rank up to 12" in done.out
    assert f"wrote {tmp_path / 'out'}" in done.out
    assert "norm.weight" in done.err
    assert run("delta", tmp_path / "out", "-o", tmp_path / "d.safetensors").code == 0
    before, after = load_file(base), load_file(tuned)
    for name, delta in load_file(tmp_path / "d.safetensors").items():
        torch.testing.assert_close(delta, after[name] - before[name], rtol=1e-4, atol=1e-5)


def test_json_all_and_dry_run(run: Run, tmp_path: Path) -> None:
    base, tuned = two(tmp_path)
    report = run("extract", base, tuned, "--energy", 0.5, "-o", tmp_path / "out", "--dry-run", "--json").json
    assert len(report["targets"]) == 3
    assert list(report["left_out"]) == ["norm.weight"]
    assert not (tmp_path / "out").exists()
    assert run("extract", base, tuned, "--rank", 2, "-o", tmp_path / "out", "--all").out.count("q_proj") == 3


def test_wrong_calls_fail_in_one_line(run: Run, tmp_path: Path) -> None:
    base, tuned = two(tmp_path)
    for arguments, code in (
        ((base, tuned, "-o", tmp_path / "out"), 2),
        ((base, base, "--rank", 2, "-o", tmp_path / "out"), 6),
        ((base, tmp_path / "none.safetensors", "--rank", 2, "-o", tmp_path / "out"), 3),
    ):
        done = run("extract", *arguments)
        assert done.code == code, done.err
        assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert run("extract", base, tuned, "--rank", 2, "-o", tmp_path / "out").code == 5
    assert run("extract", base, tuned, "--rank", 2, "-o", tmp_path / "out", "--force").code == 0


def test_one_bit_to_a_number(run: Run, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    base = {"layers.0.q_proj.weight": torch.randn(16, 64, generator=generator), "norm.weight": torch.ones(64)}
    tuned = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    models, out = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"), tmp_path / "delta.bin"
    dry = run("extract", *models, "--to", "bitdelta", "-o", out, "--dry-run")
    assert (dry.code, out.exists()) == (0, False)
    done = run("extract", *models, "--to", "bitdelta", "-o", out)
    assert done.code == 0
    assert "1 matrices, one bit to a number, relative error 0.59" in done.out
    assert "1 changed parameters are kept whole" in done.err.replace("\n", " ")
    assert set(torch.load(out, weights_only=True)) == {
        "layers.0.q_proj.mask", "layers.0.q_proj.coeff", "norm.weight",
    }  # fmt: skip
    for verb in ("info", "inspect"):
        assert run(verb, out).code == 0
    assert run("diff", out, out).code == 0
    assert run("delta", out, "--base", models[0], "-o", tmp_path / "d.safetensors").code == 0
    found = load_file(tmp_path / "d.safetensors")
    torch.testing.assert_close(found["norm.weight"], tuned["norm.weight"] - base["norm.weight"])
    again = run("extract", *models, "--to", "bitdelta", "-o", out)
    assert (again.code, again.err.count("\n")) == (5, 1)
    ranked = run("extract", *models, "--to", "bitdelta", "--rank", 2, "-o", tmp_path / "x.bin")
    assert ranked.code == 2
    assert "leave --rank out" in ranked.err


def test_all_of_the_changes_go_into_a_file_that_quantize_reads(run: Run, tmp_path: Path) -> None:
    base, tuned = two(tmp_path)
    made = tmp_path / "whole.safetensors"
    planned = run("extract", base, tuned, "--to", "lycoris", "-o", made, "--dry-run", "--json").json
    assert not made.exists()
    done = run("extract", base, tuned, "--to", "lycoris", "-o", made, "--json").json
    assert done["targets"] == planned["targets"]
    assert done["total"]["bytes"] == made.stat().st_size
    assert done["total"]["relative_error"] < 1e-6
    before, after = load_file(base), load_file(tuned)
    stored = load_file(made)
    assert len([key for key in stored if key.endswith(".diff")]) == 3
    for i in range(3):
        name = f"layers.{i}.q_proj.weight"
        assert torch.equal(stored[f"lycoris_layers_{i}_q_proj.diff"], after[name] - before[name])
    assert run("quantize", made, "--bits", 3, "-o", tmp_path / "small").code == 0
    wrong = run("extract", base, tuned, "--to", "lycoris", "--rank", 2, "-o", tmp_path / "no.safetensors")
    assert wrong.code == 2
    assert "lycoris has no ranks; leave --rank out" in wrong.err
