"""`loratools hub route` and `loratools hub route-fit`, with features of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub.conftest import write_peft
from safetensors.torch import load_file

import loratools
from loratools.training import encoder

Run = Callable[..., Any]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub of two adapters, examples of them with features, and queries."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("ab"):
        write_peft(tmp_path / "hub" / name, i)
    rng = np.random.default_rng(0)
    labels = ["a"] * 20 + ["b"] * 20 + ["base"] * 5
    axes = np.eye(4)[[0] * 20 + [1] * 20 + [2] * 5]
    rows = [json.dumps({"adapter": label, "text": f"text {i}"}) for i, label in enumerate(labels)]
    Path("examples.jsonl").write_text("\n".join(rows))
    np.save("examples.npy", axes + 0.1 * rng.normal(size=axes.shape))
    np.save("queries.npy", np.array([[1.0, 0.1, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]]))
    queries = [{"adapter": name, "text": f"query\x1b {name}"} for name in ("a", "b", "base")]
    Path("queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    Path("losses.csv").write_text("scenario,a,b,base\na,1,2,3\nb,2,1,3\nbase,3,3,1\n")
    return tmp_path


FIT = ("hub", "route-fit", "hub", "examples.jsonl", "--features", "examples.npy")


def test_fit_then_route(run: Run, place: Path) -> None:
    fitted = run(*FIT, "--losses", "losses.csv")
    assert (fitted.code, fitted.err) == (0, "")
    assert " % of 8 right" in fitted.out
    assert all(len(line) <= 80 for line in fitted.out.splitlines())
    assert (place / "hub" / "route.json").is_file()
    assert run(*FIT).code == 5
    told = run(*FIT, "--force", "--json", "--losses", "losses.csv").json["held_out"]
    assert (told["nearest"], told["base_rejected"], told["regret"]["texts"]) == (1.0, 1.0, 13)
    loss = {"a": {"a": 0, "b": 1, "base": 2}, "b": {"a": 1, "b": 0, "base": 2}, "base": {"a": 2, "b": 2, "base": 0}}
    cost = sum(loss[label][name] * n for label, row in told["confusion"].items() for name, n in row.items())
    assert told["regret"]["mean"] == pytest.approx(cost / 13)
    assert told["accuracy"] == (told["confusion"]["a"]["a"] + told["confusion"]["b"]["b"]) / 8
    routed = run(
        "hub", "route", "hub", "--file", "queries.jsonl", "--features", "queries.npy", "--losses", "losses.csv"
    )
    assert routed.code == 0
    assert "\x1b" not in routed.out
    assert all(len(line) <= 80 for line in routed.out.splitlines())
    assert "1 with" not in routed.err
    done = run("hub", "route", "hub", "--file", "queries.jsonl", "--features", "queries.npy", "--json", "--top", 1)
    assert [text["adapter"] for text in done.json["texts"]] == ["a", "b", "base"]
    assert [len(text["candidates"]) for text in done.json["texts"]] == [1, 1, 1]
    assert done.json["quality"]["accuracy"] == 1.0
    alone = run("hub", "route", "hub", "--features", "queries.npy", "--table", "t.csv")
    assert "row 3" in alone.out
    assert Path("t.csv").read_text().splitlines()[2].startswith("row 2,b,,b,")


def test_the_best_of_a_text_become_one_adapter(run: Run, place: Path) -> None:
    run(*FIT)
    np.save("one.npy", np.array([[1.0, 0.4, 0, 0]]))
    route = ("hub", "route", "hub", "--text", "x", "--features", "one.npy")
    scenarios = json.loads((place / "hub" / "route.json").read_text())["adapters"]
    scenarios["a"]["threshold"] = 0.5
    stated = json.loads((place / "hub" / "route.json").read_text()) | {"adapters": scenarios}
    (place / "hub" / "route.json").write_text(json.dumps(stated))
    done = run(*route, "--mix", 2, "-o", "both", "--json")
    assert done.code == 0, done.err
    (first, second), shares = (done.json["texts"][0]["candidates"][i]["adapter"] for i in (0, 1)), []
    shares = [c["confidence"] for c in done.json["texts"][0]["candidates"]]
    assert (first, second) == ("a", "b")
    stem = "base_model.model.model.layers.0.self_attn.q_proj"

    def dense(name: str) -> torch.Tensor:
        tensors = load_file(place / "hub" / name / "adapter_model.safetensors")
        return 2.0 * tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()

    want = (shares[0] * dense("a") + shares[1] * dense("b")) / sum(shares)
    found = loratools.load("both")["model.layers.0.self_attn.q_proj"].operator().dense().double()
    assert float((found - want).norm() / want.norm()) < 1e-6
    np.save("far.npy", np.array([[0, 0, 0, 1.0]]))
    refused = run("hub", "route", "hub", "--text", "x", "--features", "far.npy", "--mix", 2, "-o", "none")
    assert refused.code == 6
    assert "goes to the base" in refused.err
    assert not Path("none").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "what is to be routed"),
        (("--text", " "), 2, "--text is empty"),
        (("--text", "a", "--file", "queries.jsonl"), 2, "exclude each other"),
        (("--text", "a", "--features", "queries.npy"), 4, "one row for each of 1 texts"),
        (("--text", "a", "--features", "narrow.npy"), 4, "features of 3 numbers, and the scenarios have 4"),
        (("--text", "a", "--features", "nan.npy"), 4, "nan.npy: row 1 of the features holds NaN"),
        (("--features", "queries.npy", "--encoder", "x"), 2, "exclude each other"),
        (("--features", "queries.npy", "--examples", "examples.jsonl"), 2, "--examples fits with the encoder"),
        (("--features", "queries.npy", "--top", "0"), 2, "--top"),
        (("--features", "queries.npy", "--losses", "losses.csv"), 2, 'rows with "adapter"'),
        (("--features", "queries.npy", "--mix", "2"), 2, "give both, and one text"),
        (("--features", "queries.npy", "--set", "no.json"), 3, "route-fit"),
        (("--file", "bad.jsonl", "--features", "queries.npy"), 3, "bad.jsonl, line 2: is not JSON"),
    ],
)
def test_wrong_calls_fail_in_one_line(run: Run, place: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    assert run(*FIT).code == 0
    np.save("narrow.npy", np.ones((1, 3)))
    np.save("nan.npy", np.array([[np.nan, 0, 0, 1]]))
    Path("bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    done = run("hub", "route", "hub", *arguments)
    assert (done.code, done.out) == (code, "")
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_adapters_that_the_hub_lacks(run: Run, place: Path) -> None:
    assert run(*FIT).code == 0
    (place / "hub" / "b").rename(place / "hub" / "c")
    done = run("hub", "route", "hub", "--features", "queries.npy")
    assert done.code == 3
    assert "the hub has no adapter 'b'; it has 'a', 'c'" in done.err
    assert "no adapter 'b'" in run(*FIT, "--force").err


def test_examples_that_are_there_twice_are_warned_of(run: Run, place: Path) -> None:
    lines = Path("examples.jsonl").read_text().splitlines()
    Path("examples.jsonl").write_text("\n".join([lines[1], *lines[1:]]))
    assert "1 examples are there twice" in run(*FIT).err


def test_without_the_extra_the_error_names_it(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*FIT).code == 0
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package_at_all")
    done = run("hub", "route", "hub", "--text", "a")
    assert done.code == 4
    assert "pip install 'loratools[route]'" in done.err
