"""`loratools check`: what it says, its exit status, and --fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import loratools
from loratools.ops.servers import SERVERS
from loratools_cli.check import check

Run = Callable[..., Any]
Make = Callable[..., Path]


def test_the_servers_are_those_of_the_table() -> None:
    annotated = get_type_hints(check)["server"]
    assert get_args(annotated) == tuple(SERVERS)


def test_it_loads(run: Run, peft: Make) -> None:
    done = run("check", peft(), "--for", "vllm")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == ["start the server with --max-lora-rank 8", "loads in vLLM"]


def test_it_does_not_and_says_why(run: Run, peft: Make) -> None:
    done = run("check", peft(use_rslora=True), "--for", "slora")
    assert done.code == 4
    assert "no-rslora: computed wrongly: it scales by alpha / r" in done.out
    assert "--portable" in done.out
    assert done.out.splitlines()[-1] == "does not work in S-LoRA"


def test_json_is_the_report(run: Run, peft: Make) -> None:
    source = peft(use_rslora=True)
    done = run("check", source, "--for", "sglang", "--json")
    assert done.code == 0  # a problem of old versions alone
    assert done.json == json.loads(json.dumps(loratools.check(loratools.load(source), "sglang").to_dict()))
    assert done.json["findings"][0]["severity"] == "old"


def attention(tensors: dict[str, torch.Tensor]) -> None:
    """Make it one of q, k, v and o in every layer, all square, as S-LoRA wants them."""
    q = {key: tensor for key, tensor in tensors.items() if "q_proj" in key}
    tensors |= {key.replace("q_proj", f"{leaf}_proj"): tensor.clone() for key, tensor in q.items() for leaf in "kvo"}


def test_fix_writes_what_loads(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft(use_rslora=True, edit=attention, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    done = run("check", source, "--for", "slora", "--fix", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-2:] == ["loads in S-LoRA", f"wrote {tmp_path / 'out'}"]
    assert run("check", tmp_path / "out", "--for", "slora").code == 0
    assert run("diff", source, tmp_path / "out").code == 0
    again = run("check", source, "--for", "slora", "--fix", "-o", tmp_path / "out")
    assert again.code == 5
    assert "--force" in again.err


def test_a_dry_run_writes_nothing(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft(use_rslora=True, edit=attention, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    done = run("check", source, "--for", "slora", "--fix", "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0
    assert not (tmp_path / "out").exists()


def test_nothing_to_fix(run: Run, peft: Make, tmp_path: Path) -> None:
    done = run("check", peft(), "--for", "vllm", "--fix", "-o", tmp_path / "out")
    assert done.code == 6
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra", [("--drop", "bias"), ("--rank", 2), ("--exact",), ("-o", "x")])
def test_how_to_fix_without_fix(run: Run, peft: Make, extra: tuple[object, ...]) -> None:
    done = run("check", peft(), "--for", "vllm", *extra)
    assert done.code == 2
    assert "give --fix" in done.err


def test_an_unknown_server_is_a_usage_error(run: Run, peft: Make) -> None:
    assert run("check", peft(), "--for", "ollama").code == 2
