"""`loratools calibrate`, and `squeeze --weights` with what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.tiny import save_tiny_lora, save_tiny_model

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base, adapter, texts."""
    folder = tmp_path_factory.mktemp("places")
    texts = folder / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"prompt": f"{i} is ", "answer": "a number"}) for i in range(5)))
    return save_tiny_model(folder / "base"), save_tiny_lora(folder / "adapter"), texts


def test_calibrate_and_squeeze(run: Run, places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, texts = places
    stats = tmp_path / "stats.safetensors"
    done = run("calibrate", base, adapter, "--data", texts, "-o", stats, "--batch", 2, "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert (report["texts"], report["tokens"], len(report["targets"])) == (5, 65, 14)
    assert all(1 <= row["effective_rank"] <= row["rank"] == 4 for row in report["targets"].values())
    assert run("calibrate", base, adapter, "--data", texts, "-o", stats).code == 5
    done = run("calibrate", base, adapter, "--data", texts, "-o", stats, "--force")
    assert "14 targets" in done.out
    assert "65 tokens of 5 texts" in done.out
    assert "not applied" not in done.out
    assert report["bare"] is False

    done = run("squeeze", adapter, "--rank", 2, "--weights", stats, "-o", tmp_path / "small")
    assert done.code == 0, done.err
    assert "weighted" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines()[:-1])
    assert "new size" in done.out
    weighed = run("squeeze", adapter, "--rank", 2, "--weights", stats, "--dry-run", "--json").json
    plain = run("squeeze", adapter, "--rank", 2, "--dry-run", "--json").json
    assert weighed["weighted_error"] > 0
    assert plain["weighted_error"] is None
    assert all(row["weighted_error"] is None for row in plain["targets"].values())
    assert "weighted" not in run("squeeze", adapter, "--rank", 2, "--dry-run").out
    assert run("squeeze", adapter, "--energy", 0.8, "--weights", stats, "--dry-run").code == 0
    assert run("squeeze", tmp_path / "small", "--rank", 1, "--weights", stats).code == 4


def test_a_fused_model_runs_bare(run: Run, places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, texts = places
    assert run("fuse", base, adapter, "-o", tmp_path / "fused").code == 0
    found = {}
    for name, model, extra in (
        ("base", base, ()),
        ("fused", tmp_path / "fused", ("--bare",)),
        ("bare", base, ("--bare",)),
    ):
        done = run("calibrate", model, adapter, "--data", texts, "-o", tmp_path / f"{name}.stats", *extra)
        assert done.code == 0, done.err
        assert ("the adapter not applied" in done.out) == bool(extra)
        found[name] = load_file(tmp_path / f"{name}.stats")
    last = "model.layers.1.mlp.down_proj.moment"
    for key, moment in found["base"].items():
        torch.testing.assert_close(found["fused"][key], moment, rtol=1e-4, atol=1e-6 * float(moment.abs().max()))
    assert not torch.allclose(found["bare"][last], found["base"][last], rtol=0.05)


def test_without_data(run: Run, places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = places
    stats = tmp_path / "stats.safetensors"
    done = run("calibrate", base, adapter, "--data-free", "-o", stats)
    assert (done.code, done.err) == (0, "")
    assert "the base's norms alone" in done.out
    assert run("squeeze", adapter, "--rank", 2, "--weights", stats, "--dry-run").code == 0


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        ((), 2, "give --data"),
        (("--data-free", "--data", "x.jsonl"), 2, "one of the two"),
        (("--data", "missing.jsonl"), 3, "missing.jsonl"),
        (("--data-free", "--batch", 0), 2, "batch must be at least 1"),
        (("--data-free", "--bare"), 2, "--bare goes with --data"),
    ],
)
def test_mistakes(
    run: Run, places: tuple[Path, Path, Path], tmp_path: Path, extra: tuple[object, ...], code: int, message: str
) -> None:
    done = run("calibrate", places[0], places[1], "-o", tmp_path / "stats.safetensors", *extra)
    assert done.code == code
    assert message in done.err


def test_bits_and_ranks_are_weighed_too(run: Run, places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = places
    stats = tmp_path / "stats.safetensors"
    assert run("calibrate", base, adapter, "--data-free", "-o", stats).code == 0
    small = tmp_path / "small.safetensors"
    done = run("squeeze", adapter, "--ratio", 2, "--bits", "auto", "--weights", stats, "-o", small, "--json")
    assert done.code == 0, done.err
    assert done.json["total"]["bytes_after"] == small.stat().st_size
    made_by = run("info", small, "--json").json["record"]["arguments"]
    assert made_by["tokens"] == 0
    refused = run("quantize", adapter, "--bits", 4, "--method", "rtn", "--weights", stats, "-o", tmp_path / "other")
    assert refused.code == 2
    assert "statistics are for --method grid" in refused.err
