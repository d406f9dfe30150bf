"""`loratools compare`: the tables, JSON, names, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ops import compared as naive

import loratools

Run = Callable[..., Any]


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    tensors = naive.base_tensors()
    tuned = {name: t + naive.normal(*t.shape, seed=7, spread=0.1) for name, t in tensors.items()}
    magnitudes = {t: 1.1 * tensors[f"{t}.weight"].norm(dim=1) for t in naive.SHAPES}
    return {
        "base": naive.write_model(tmp_path / "base", tensors, shards=2),
        "full": naive.write_model(tmp_path / "full", tuned),
        "lora": naive.write_peft(tmp_path / "lora", naive.factors(3, 1)),
        "dora": naive.write_peft(tmp_path / "dora", naive.factors(4, 2), magnitudes=magnitudes),
    }


def test_the_tables(run: Run, paths: dict[str, Path]) -> None:
    done = run("compare", *paths.values())
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 80, done.out
    base = loratools.load_base(paths["base"])
    fine_tunes = {n: loratools.open_fine_tune(p, base) for n, p in paths.items() if n != "base"}
    report = loratools.compare(base, fine_tunes)
    lines = [line.split() for line in done.out.splitlines()]
    for name, f in report.fine_tunes.items():
        row = next(words for words in lines if words[:1] == [name])
        assert row[1:3] == [name, {"full": "-", "lora": "3", "dora": "4"}[name]]
        assert f"{f.left_intruders}|{f.right_intruders}" == row[-1]
    missed = next(words for words in lines if words[:1] == ["lora"] and "|" not in words[-1])
    assert report.fine_tunes["lora"].missed is not None
    numbers = report.fine_tunes["lora"].missed
    wanted = [numbers.error, numbers.best_error, numbers.space_error, 0.0]
    assert [float(word) for word in missed[1:]] == pytest.approx(wanted, rel=0.01)
    for pair in report.pairs:
        row = next(words for words in lines if words[:3] == [pair.a, "|", pair.b])
        assert float(row[3]) == pytest.approx(pair.cosine, rel=0.01)
    assert "skipped: 3" in done.out
    assert "up_proj: " in done.out


def test_every_target_is_shown_where_asked_for(run: Run, paths: dict[str, Path]) -> None:
    done = run("compare", *paths.values(), "--all")
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 80, done.out
    for target in naive.SHAPES:
        m, n = naive.SHAPES[target]
        assert f"{target}.weight, {m} x {n}" in done.out
    assert "dora: gains " in done.out
    assert done.out.count("lora: misses ") == 6


def test_json_is_the_report(run: Run, paths: dict[str, Path]) -> None:
    done = run("compare", *paths.values(), "--top-k", 3, "--epsilon", 0.7, "--target", "q_proj", "--json")
    base = loratools.load_base(paths["base"])
    fine_tunes = {n: loratools.open_fine_tune(p, base) for n, p in paths.items() if n != "base"}
    report = loratools.compare(base, fine_tunes, top_k=3, epsilon=0.7, target="q_proj")
    assert done.json == json.loads(json.dumps(report.to_dict()))
    assert list(done.json["fine_tunes"]) == ["full", "lora", "dora"]
    assert "NaN" not in done.out
    assert "Infinity" not in done.out


def test_names_may_be_given(run: Run, paths: dict[str, Path]) -> None:
    done = run("compare", paths["base"], paths["lora"], paths["dora"], "--name", "one", "--name", "two", "--json")
    assert list(done.json["fine_tunes"]) == ["one", "two"]


def test_initial_factors_are_subtracted(run: Run, paths: dict[str, Path], tmp_path: Path) -> None:
    trained = naive.write_peft(tmp_path / "pissa", naive.factors(3, 5), init_lora_weights="pissa")
    refused = run("compare", paths["base"], trained)
    assert refused.code == 4
    assert "--initial-adapter" in refused.err
    done = run("compare", paths["base"], trained, "--initial-adapter", paths["lora"], "--json")
    assert done.json["fine_tunes"]["pissa"]["rank_max"] == 6


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("lora", "lora"), 2, "lora: is given twice; name each fine-tune once"),
        (("lora", "dora", "--initial-adapter", "lora"), 2, "--initial-adapter goes with one adapter"),
        (("lora", "dora", "--name", "one"), 2, "--name was given 1 times for 2"),
        (("lora", "dora", "--name", "one", "--name", "one"), 2, "name each, differently"),
        (("lora", "--top-k", "0"), 2, "top_k is 0"),
        (("base",), 6, "no matrix differs from"),
        (("spoilt",), 4, "holds NaN or infinity"),
        (("absent",), 3, "absent"),
    ],
)
def test_what_goes_wrong(
    run: Run, paths: dict[str, Path], tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    spoilt = dict(naive.factors(3, 1))
    spoilt["model.layers.0.mlp.up_proj"][0][0, 0] = torch.nan
    naive.write_peft(tmp_path / "spoilt", spoilt)
    known = paths | {"spoilt": tmp_path / "spoilt", "absent": tmp_path / "absent"}
    done = run("compare", paths["base"], *(known.get(word, word) for word in arguments))
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert done.err.count("\n") == 1
