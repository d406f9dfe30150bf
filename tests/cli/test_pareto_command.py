"""`loratools pareto`: adapters, models that were tuned whole, statistics, and a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.tiny import save_tiny_lora, save_tiny_model

import loratools
from loratools.ops.statistics import Statistics, fingerprint

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lora(tmp_path_factory.mktemp("loras") / "lora", rank=8)


def two_models(folder: Path) -> tuple[Path, Path]:
    """A base and what was tuned from it, in weights files alone."""
    generator = torch.Generator().manual_seed(7)
    base = {f"layers.{i}.mlp.up_proj.weight": torch.randn(160, 128, generator=generator) for i in range(3)}
    base["norm.weight"] = torch.ones(128)
    save_file(base, folder / "base.safetensors")
    low = {name: torch.randn(len(t), 4, generator=generator) for name, t in base.items()}
    for name, tensor in base.items():
        wide = torch.randn(4, 128, generator=generator)
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        tensor += 0.2 * (low[name] @ wide if tensor.ndim == 2 else wide[0])
    save_file(base, folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    text = "".join(json.dumps({"prompt": f"number {i}", "answer": f" {i + 1}"}) + "\n" for i in range(4))
    (tmp_path / "rows.jsonl").write_text(text)
    return tmp_path / "rows.jsonl"


def test_a_task_is_done_by_the_best_points_alone(run: Run, lora: Path, base: Path, rows: Path, tmp_path: Path) -> None:
    table = tmp_path / "curves.csv"
    done = run("pareto", lora, "--methods", "rtn,sign", "--base", base, "--eval", rows, "--json", "--table", table)
    assert done.code == 0, done.err
    assert set(done.json["evaluated"]) == {"base", "adapter"}
    assert done.json["evaluated"]["base"]["rows"] == 4
    points = done.json["points"]
    assert any(not p["best"] for p in points)
    for point in points:
        assert (point["nll"] is not None) == (point["exact_match"] is not None) == point["best"]
    nearest = min((p for p in points if p["best"]), key=lambda p: p["relative_error"])
    assert nearest["nll"] == pytest.approx(done.json["evaluated"]["adapter"]["nll"], rel=0.05)
    assert table.read_text().splitlines()[0].endswith(",nll,exact_match")
    shown = run("pareto", lora, "--methods", "sign", "--base", base, "--eval", rows, "--max-rows", 2)
    assert shown.code == 0
    assert "NLL" in shown.out
    assert "match %" in shown.out


def test_a_model_that_was_tuned_whole(run: Run, tmp_path: Path) -> None:
    base, tuned = two_models(tmp_path)
    found = run("pareto", tuned, "--base", base, "--methods", "grid,svd,rtn,bitdelta,balanced", "--json")
    assert found.code == 0, found.err
    report = found.json
    assert {p["method"] for p in report["points"]} == {"grid", "svd", "rtn", "bitdelta"}
    assert any("balanced was left out: there are no factors" in w for w in report["warnings"])
    assert any("1 changed parameters are no matrices" in w for w in report["warnings"])
    before, after = load_file(base), load_file(tuned)
    truth = {n: after[n].double() - before[n].double() for n in after if "mlp" in n}
    for i, point in enumerate(p for p in report["points"] if p["method"] in ("grid", "svd", "bitdelta")):
        place = tmp_path / str(i)
        place.mkdir()
        for command in point["command"].split(" && "):
            words = command.removeprefix("loratools ").split()
            named = {"BASE": base, "TUNED": tuned, "WHOLE.safetensors": place / "whole.safetensors", "OUT": place / "o"}
            words = [str(named.get(word, word)) for word in words]
            done = run(*words, *([] if "-o" in words else ["-o", place / "small"]))
            assert done.code == 0, (command, done.err)
        made = place / "small.safetensors" if (place / "small.safetensors").exists() else place / "o"
        written = made if made.is_file() else made / "adapter_model.safetensors"
        assert written.stat().st_size == pytest.approx(point["bytes"], abs=600), point
        adapter = loratools.load(made)
        flat = {name.removesuffix(".weight").replace(".", "_"): d for name, d in truth.items()}
        squares = [0.0, 0.0]
        for target, update in adapter.items():
            d = flat[target.removeprefix("lycoris_").replace(".", "_")]
            squares[0] += float((update.delta().double() - d).square().sum())
            squares[1] += float(d.square().sum())
        assert (squares[0] / squares[1]) ** 0.5 == pytest.approx(point["relative_error"], rel=1e-3), point


def test_statistics_add_points_and_weigh_all(run: Run, lora: Path, tmp_path: Path) -> None:
    adapter = loratools.load(lora)
    generator = torch.Generator().manual_seed(1)
    moments, means = {}, {}
    for target, update in adapter.items():
        down = update.parameters()["down"].double()
        x = torch.randn(100, down.shape[1], generator=generator, dtype=torch.float64)
        x *= torch.logspace(0.5, -0.5, down.shape[1], dtype=torch.float64)
        moments[target], means[target] = (x @ down.T).T @ (x @ down.T) / 100, x.square().mean(0)
    prints = {target: fingerprint(update) for target, update in adapter.items()}
    stats = Statistics(moments, means, 100, prints).save(tmp_path / "stats.safetensors")
    figure = tmp_path / "a.png"
    done = run("pareto", lora, "--weights", stats, "--methods", "grid,rtn", "--json", "--plot", figure)
    assert done.code == 0, done.err
    points = done.json["points"]
    assert figure.exists()
    assert {p["method"] for p in points} == {"grid", "grid, weighted", "rtn"}
    for p in points:
        beaten = any(q["bytes"] <= p["bytes"] and q["weighted_error"] < p["weighted_error"] for q in points)
        assert p["best"] != beaten
    one = next(p for p in points if p["method"] == "grid, weighted" and p["best"])
    words = one["command"].removeprefix("loratools ").replace("IN", str(lora)).replace("stats.safetensors", str(stats))
    told = run(*words.split(), "-o", tmp_path / "o", "--json").json["total"]
    assert told["bytes_after"] == one["bytes"]
    assert told["weighted_error"] == pytest.approx(one["weighted_error"], rel=1e-6)
    assert "as inputs see it" in run("pareto", lora, "--weights", stats, "--methods", "rtn").out
    shown = run("quantize", lora, "--bits", 4, "--weights", stats, "-o", tmp_path / "p").out
    assert "is the error as the inputs see it" in shown


def test_wrong_calls_fail_in_one_line(run: Run, lora: Path, base: Path, rows: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--eval", rows), "give its folder with --base"),
        (("--base", base, "--chat"), "--chat is for --eval"),
        (("--max-rows", 3), "--max-rows is for --eval"),
        (("--methods", "grid,zip"), "no method 'zip'"),
    ):
        done = run("pareto", lora, *arguments)
        assert done.code == 2, done.err
        assert message in done.err
        assert done.err.count("\n") == 1
    before, tuned = two_models(tmp_path)
    done = run("pareto", tuned, "--base", before, "--weights", rows)
    assert done.code == 2
    assert "tuned whole has none" in done.err
