"""`loratools intruders`: counts, JSON, and the adapter that --mitigate writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools

Run = Callable[..., Any]
Make = Callable[..., Path]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    modules = [f"model.layers.{i}.self_attn.{m}" for i in range(2) for m in ("q_proj", "k_proj", "v_proj")]
    save_file({f"{m}.weight": torch.randn(32, 32, generator=generator) for m in modules}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def test_the_table_and_the_sweep(run: Run, peft: Make, base: Path) -> None:
    done = run("intruders", base, peft())
    assert done.code == 0, done.err
    report = loratools.intruders(loratools.load(peft("again")), loratools.load_base(base))
    assert f"{report.total['left']} left and {report.total['right']} right intruders" in " ".join(done.out.split())
    assert "q_proj x2" in done.out
    swept = run("intruders", base, peft("third"), "--sweep")
    assert f"0.5: {report.sweep['0.5']['left']}|{report.sweep['0.5']['right']}" in swept.out


def test_json_is_the_report(run: Run, peft: Make, base: Path) -> None:
    source = peft()
    done = run("intruders", base, source, "--top-k", 4, "--epsilon", 0.6, "--json")
    report = loratools.intruders(loratools.load(source), loratools.load_base(base), top_k=4, epsilon=0.6)
    assert done.json == json.loads(json.dumps(report.to_dict()))
    first = next(iter(done.json["targets"].values()))
    assert {"count", "indices", "max_cosine"} <= set(first["left"])
    assert len(first["right"]["max_cosine"]) == 4


def test_mitigation_writes_an_adapter(run: Run, peft: Make, base: Path, tmp_path: Path) -> None:
    source = peft()
    done = run("intruders", base, source, "--mitigate", 0.75, "-o", tmp_path / "calm")
    assert done.code == 0, done.err
    assert "as a control" in " ".join(done.out.split())
    wanted, _ = loratools.mitigate(loratools.load(source), loratools.load_base(base), 0.75)
    assert loratools.diff(loratools.load(tmp_path / "calm"), wanted, tolerance=1e-6).same
    again = run("intruders", base, source, "--mitigate", 0.75, "-o", tmp_path / "calm")
    assert again.code == 5


@pytest.mark.parametrize("arguments", [("-o", "x"), ("--keep-rank",), ("--mitigate", 0.5, "--target", "q_proj")])
def test_what_does_not_go_together(run: Run, peft: Make, base: Path, arguments: tuple[object, ...]) -> None:
    assert run("intruders", base, peft(), *arguments).code == 2


def test_a_whole_model_is_examined_and_not_mitigated(run: Run, base: Path, tmp_path: Path) -> None:
    weights = load_file(base)
    name = next(iter(weights))
    weights[name] = weights[name] + 9 * torch.outer(*torch.randn(2, 32, generator=torch.Generator().manual_seed(1)))
    save_file(weights, tmp_path / "tuned.safetensors")
    done = run("intruders", base, tmp_path / "tuned.safetensors", "--json")
    assert done.code == 0, done.err
    assert list(done.json["targets"]) == [name]
    assert done.json["targets"][name]["left"]["count"] >= 1
    refused = run("intruders", base, tmp_path / "tuned.safetensors", "--mitigate", 0.5, "-o", tmp_path / "x")
    assert refused.code == 2
    assert "is a whole model" in refused.err
    assert not (tmp_path / "x").exists()


def test_the_base_comes_first(run: Run, peft: Make, base: Path) -> None:
    done = run("intruders", peft(), base)
    assert done.code == 2
    assert "is an adapter where the base model belongs" in done.err


def test_what_is_kept_is_listed_and_cleared(run: Run, peft: Make, base: Path) -> None:
    assert run("intruders", base, peft(), "--no-cache").code == 0
    assert run("cache", "--json").json["entries"] == []
    assert run("intruders", base, peft("again")).code == 0
    kept = run("cache", "--json").json
    assert len(kept["entries"]) == 6
    assert "6 weights" in run("cache").out
    cleared = run("cache", "--clear", "--json").json
    assert (cleared["freed"], cleared["entries"]) == (kept["bytes"], [])
