"""`loratools hub mixture`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub.conftest import write_peft
from safetensors.torch import load_file

import loratools

Run = Callable[..., Any]


@pytest.fixture
def experts(tmp_path: Path) -> list[Path]:
    return [write_peft(tmp_path / f"e{i}", i) for i in range(3)]


def dense(path: Path, layer: int) -> torch.Tensor:
    tensors = load_file(path / "adapter_model.safetensors")
    stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
    return 2.0 * tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()


def test_a_routed_set_becomes_one_adapter(run: Run, experts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("0.5,0.4,0.1\n0.1,0.1,0.8\n")
    arguments = ("hub", "mixture", *experts, "--router", tmp_path / "w.csv", "--top-k", 2)
    shown = run(*arguments)
    assert (shown.code, shown.err) == (0, "")
    assert "equal vs routed" in shown.out
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    done = run(*arguments, "-o", tmp_path / "merged", "--json", "--table", tmp_path / "t.csv")
    assert done.json["router"]["layers"][0]["chosen"] == [1, 2]
    assert done.json["output"] == str(tmp_path / "merged")
    assert done.json["merged_error"] < 1e-6
    assert (tmp_path / "t.csv").read_text().count("\n") == 3
    merged = loratools.load(tmp_path / "merged")
    for layer, members in enumerate([(0, 1), (0, 2)]):
        want = sum(dense(experts[i], layer) for i in members) / 2
        found = merged[f"model.layers.{layer}.self_attn.q_proj"].operator().dense().double()
        assert float((found - want).norm() / want.norm()) < 1e-6
    again = run(*arguments, "-o", tmp_path / "merged")
    assert again.code == 5
    assert "exists already" in again.err
    small = run(*arguments, "-o", tmp_path / "small", "--rank", 2, "--json")
    assert small.json["merged_error"] > 0.1


def test_without_a_router_all_are_mixed(run: Run, experts: list[Path], tmp_path: Path) -> None:
    done = run("hub", "mixture", *experts, "--prototypes", tmp_path / "p.safetensors")
    assert done.code == 0
    assert "shared directions" in done.out
    name = "model.layers.0.self_attn.q_proj"
    want = torch.linalg.svd(dense(experts[1], 0))[2][0]
    found = load_file(tmp_path / "p.safetensors")[name][1].double()
    assert abs(float(found @ want)) == pytest.approx(1.0, abs=1e-6)
    assert run("hub", "mixture", *experts, "--prototypes", tmp_path / "p.safetensors").code == 5


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--top-k", "2"), 2, "--router"),
        (("--logits",), 2, "give --router"),
        (("--rank", "2"), 2, "with -o"),
        (("--weights", "x"), 2, "needs --router"),
        (("--router", "no.csv"), 3, "no.csv"),
        (("--router", "two.npy"), 4, "routes between 2 experts, and 3 adapters"),
        (("--router", "negative.npy"), 4, "--logits"),
        (("--router", "five.npy"), 2, "5 layers and the adapters 2"),
        (("--prototypes", "p.bin"), 2, ".safetensors"),
    ],
)
def test_wrong_calls_fail_in_one_line(
    run: Run,
    experts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("two.npy", np.ones((1, 2)))
    np.save("negative.npy", np.array([[1.0, -1.0, 0.0]]))
    np.save("five.npy", np.ones((5, 3)))
    done = run("hub", "mixture", *experts, *arguments)
    assert done.code == code
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert run("hub", "mixture", *experts, "--router", "five.npy", "--one-set").code == 0
