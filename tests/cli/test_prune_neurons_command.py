"""`loratools neurons` and `loratools prune-neurons`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bottleneck_files as files
import pytest
import torch
from bottleneck_files import LAYOUTS, SIZE, WIDTH, rand
from safetensors.torch import save_file

import loratools

Run = Callable[..., Any]
LAYOUT = LAYOUTS["adaptertune"]


@pytest.fixture
def best(tmp_path: Path) -> Path:
    """A checkpoint as AdapterTune saves it, of which one unit in six can go."""
    tensors = files.made(LAYOUT)
    for name in LAYOUT.names:
        tensors[LAYOUT.keys(name)["up.weight"]][:, 2] = 0.0
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "best.pt")
    return tmp_path / "best.pt"


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    save_file({name: rand(i, 200, SIZE) for i, name in enumerate(LAYOUT.names)}, tmp_path / "acts.safetensors")
    return tmp_path / "acts.safetensors"


def test_info_says_what_it_is(run: Run, best: Path) -> None:
    done = run("info", best)
    assert done.code == 0
    told = " ".join(done.out.split())
    assert "2 of AdapterTune: 12 -> 6 units, gelu, 324 parameters; h + scale * up(act(down h)), no update" in told
    assert run("info", best, "--json").json["bottlenecks"]["blocks.0.adapter"]["width"] == WIDTH


@pytest.mark.parametrize(
    "command",
    [
        "inspect {}", "squeeze {} --rank 2", "truncate {} --rank 2", "quantize {} --bits 4", "dequantize {}",
        "pareto {}", "convert {} --to peft", "check {} --for vllm", "delta {} -o out.safetensors", "diff {} {}",
        "reparameterize {} --to ldu", "merge {} {} -o out",
    ],
)  # fmt: skip
def test_commands_for_weights_refuse_it_in_one_line(run: Run, best: Path, command: str) -> None:
    done = run(*command.format(*[best] * 2).split())
    assert done.code == 4
    assert done.out == ""
    assert done.err == (
        f"error: {best}: holds nonlinear bottlenecks (AdapterTune), h + scale * up(act(down h)), which no update of a "
        "weight equals; use loratools neurons or loratools prune-neurons\n"
    )


def test_neurons(run: Run, best: Path, stats: Path) -> None:
    done = run("neurons", best)
    assert done.code == 0
    told = " ".join(done.out.split())
    assert "AdapterTune: 2 bottlenecks of 6 units, gelu, 324 parameters; no update of a weight" in told
    assert "over a standard normal z, which is an assumption" in told
    assert "warning: the scale is not in the file" in done.err
    whole = run("neurons", best, "--stats", stats, "--json").json
    assert whole["linearised"] == "activations"
    assert whole["targets"]["blocks.1.adapter"]["zero"] == 1
    assert len(whole["targets"]["blocks.1.adapter"]["singular_values"]) == WIDTH
    assert "over the activations" in run("neurons", best, "--stats", stats).out
    assert run("neurons", best, "--all").out.count("blocks.1.adapter") == 2


def test_exact(run: Run, best: Path, tmp_path: Path) -> None:
    done = run("prune-neurons", best, "--exact")
    assert done.code == 0
    assert "6 -> 5" in done.out
    assert f"wrote {tmp_path / 'best.exact.safetensors'}" in done.out
    before, after = torch.load(best, weights_only=True)["model"], files.read(tmp_path / "best.exact.safetensors")
    for name in LAYOUT.names:
        truth = files.added(LAYOUT, name, before, rand(5, 40, SIZE))
        assert files.distance(files.added(LAYOUT, name, after, rand(5, 40, SIZE)), truth) < 1e-6
    again = run("prune-neurons", tmp_path / "best.exact.safetensors", "--exact")
    assert again.code == 6
    assert "no hidden unit can go; give a width with activations" in again.err


def test_width_and_ratio(run: Run, best: Path, stats: Path, tmp_path: Path) -> None:
    done = run("prune-neurons", best, "--width", 3, "--stats", stats, "--json")
    assert done.code == 0
    row = done.json["targets"]["blocks.0.adapter"]
    assert (row["width_after"], row["zero"]) == (3, 1)
    assert 0 < row["error"] < 1
    assert 0 < row["held_out_error"] < 1.5
    assert done.json["output"] == str(tmp_path / "best.w3.safetensors")
    halved = run("prune-neurons", best, "--ratio", 2, "--stats", stats, "-q")
    assert halved.out == f"{tmp_path / 'best.x2.safetensors'}\n"
    found, wanted = (files.read(tmp_path / f"best.{tag}.safetensors") for tag in ("x2", "w3"))
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    table = run("prune-neurons", best, "--width", 2, "--stats", stats, "--held-out", 0.5)
    assert "on 100 tokens, and on 100 held out" in table.out


def test_dry_run_writes_nothing(run: Run, best: Path, tmp_path: Path) -> None:
    done = run("prune-neurons", best, "--exact", "--dry-run")
    assert "dry run" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt"}


def test_a_folder_stays_a_folder(run: Run, samples: Callable[[str], Path], tmp_path: Path) -> None:
    source = samples("others/adapters_pfeiffer")
    names = list(loratools.load(source).format.bottlenecks)
    save_file({name: rand(i, 50, 16) for i, name in enumerate(names)}, tmp_path / "acts.safetensors")
    done = run("prune-neurons", source, "--width", 2, "--stats", tmp_path / "acts.safetensors", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter.safetensors", "adapter_config.json"}
    config = loratools.load(tmp_path / "out").config
    assert config is not None
    assert config["config"]["reduction_factor"] == 8
    refused = run(
        "prune-neurons", source, "--width", 2, "--stats", tmp_path / "acts.safetensors", "-o", tmp_path / "out"
    )
    assert refused.code == 5


def test_one_rule_is_asked_for(run: Run, best: Path, stats: Path) -> None:
    for arguments in ([], ["--exact", "--width", 2], ["--ratio", 2, "--width", 2]):
        done = run("prune-neurons", best, *arguments)
        assert done.code == 2
        assert "give --width, --ratio or --exact, one of the three" in done.err
    done = run("prune-neurons", best, "--width", 2)
    assert done.code == 2
    assert "pass activations (--stats)" in done.err
    assert run("prune-neurons", best, "--exact", "--activation", "sine").code == 2
