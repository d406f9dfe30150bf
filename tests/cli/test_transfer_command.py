"""`loratools transfer`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.tiny_task import Places

from loratools.errors import UsageError

Run = Callable[..., Any]
SMALL = ("--samples", 12, "--max-input-tokens", 8, "--max-answer-tokens", 12, "--rank", 2, "--epochs", 1, "--batch", 4)


def test_transfer(run: Run, places: Places, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "moved"
    rows.write_text(json.dumps({"prompt": "No: 44\nW:", "answer": " low"}) + "\n")
    told = ("transfer", places.adapter, "--from", places.first, "--to", places.second, "--seeds", places.seeds)
    page = tmp_path / "moved.html"
    done = run(*told, "-o", out, *SMALL, "--eval", rows, "--report", page)
    assert done.code == 0, done.err
    assert f"wrote {page}" in done.err
    made = page.read_bytes()
    assert "estimated:" in done.err
    assert all(len(line) <= 80 for line in done.out.splitlines()[:-1])
    assert f"wrote {out}" in done.out
    assert run(*told, "-o", out, *SMALL).code == 5
    done = run(*told, "-o", tmp_path / "other", *SMALL, "--report", page)
    assert done.code == 5
    assert "moved.html: exists already" in done.err
    assert not list(tmp_path.glob("other*"))
    done = run(*told, "-o", out, *SMALL, "--eval", rows, "--resume", "--report", page)  # nothing is left to be done
    assert done.code == 0, done.err
    assert page.read_bytes() == made
    done = run(*told, "-o", out, *SMALL, "--eval", rows, "--resume", "--json")
    assert done.err == ""
    assert done.json == {k: v for k, v in json.loads((out / "transfer.json").read_text()).items() if k != "loratools"}
    assert set(done.json["evaluations"]) == {"target", "transferred", "teacher"}
    info = run("info", out, "--json").json
    (tmp_path / "mine").mkdir()  # which that work folder has not led to
    done = run(*told, "-o", tmp_path / "mine", *SMALL, "--work", tmp_path / "moved.transfer", "--resume")
    assert (done.code, "mine: exists already" in done.err) == (5, True)
    (out / "transfer.json").unlink()  # as a run that was killed leaves it
    assert run(*told, "-o", out, *SMALL, "--eval", rows, "--resume").code == 0
    assert (out / "transfer.json").is_file()
    done = run(*told, "-o", out, *SMALL)
    assert (done.code, done.err.count("\n")) == (5, 1)  # before anything is estimated
    assert "lora" in json.dumps(info)


def test_a_kit(run: Run, places: Places, tmp_path: Path) -> None:
    told = ("transfer", places.adapter, "--from", places.first, "--seeds", places.seeds, "--prepare-only")
    done = run(*told, "-o", tmp_path / "kit", "--max-input-tokens", 8)
    assert done.code == 0, done.err
    assert "a discriminator and 5 seeds" in done.out
    assert run(*told, "-o", tmp_path / "kit").code == 5


def test_what_is_refused(run: Run, places: Places, tmp_path: Path) -> None:
    told = ("transfer", places.adapter, "--from", places.first)
    assert run(*told).code == 2
    empty = tmp_path / "seeds.jsonl"
    empty.write_text("")
    done = run(*told, "--to", places.second, "-o", tmp_path / "moved", "--seeds", empty)
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert "holds no seeds" in done.err
    done = run(*told, "--to", "no/such", "-o", tmp_path / "moved", "--seeds", places.seeds)
    assert done.code == 3
    assert "--allow-download" in done.err
    assert run(*told, "--prepare-only").code == 2
    done = run(*told, "--to", places.second, "-o", tmp_path / "moved", "--kit", tmp_path / "nothing")
    assert done.code == 3
    assert "nothing: holds no discriminator.json" in done.err.splitlines()[-1]
    done = run(*told, "--to", places.second, "-o", tmp_path / "moved", "--loss", "ce", "--loss-temperature", 3)
    assert (done.code, "--loss-temperature is of --loss kl" in done.err) == (2, True)
    done = run(*told, "--to", places.second, "-o", tmp_path / "moved", "--threshold", 0.2, "--filter", "ratio")
    assert (done.code, "--threshold is of --filter threshold" in done.err) == (2, True)
    far = ("--to", places.second, "-o", tmp_path / "far", "--report")
    done = run(*told, *far, empty / "page.html")
    assert (done.code, done.err.count("\n")) == (5, 1)
    assert run(*told, *far, tmp_path / "page.txt").code == 2
    done = run(*told, "--prepare-only", "--seeds", places.seeds, "--report", tmp_path / "page.html")
    assert (done.code, "--prepare-only" in done.err) == (2, True)
    assert not list(tmp_path.glob("far*"))
    done = run(*told, "--prepare-only", "--seeds", places.seeds, "--to", places.second)
    assert (done.code, "makes no use of --to" in done.err) == (2, True)
    done = run(*told, "--prepare-only", "--seeds", places.seeds, "--samples", 500, "--warm-start")
    assert (done.code, "--prepare-only makes no use of --samples, --warm-start" in done.err) == (2, True)


def test_all_that_was_dropped_is_counted(run: Run, places: Places, tmp_path: Path) -> None:
    told = ("transfer", places.adapter, "--from", places.first, "--to", places.second, "-o", tmp_path / "moved")
    short = ("--samples", 30, "--max-input-tokens", 16, "--max-answer-tokens", 8, "--rank", 2, "--lr", 1e-2)
    done = run(*told, *short)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "moved" / "transfer.json").read_text())
    made, taught = report["synthesis"], report["labelling"]
    assert made["unfinished"] > 0
    assert taught["empty"] > 0
    shown = " ".join(done.out.split())
    assert f"{made['kept']} kept, " in shown
    assert f"{made['unfinished']} unfinished" in shown
    assert f"{taught['empty']} answers were empty" in done.err


def test_the_estimate_is_of_the_model_that_makes_up_inputs(
    run: Run, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speakers = []

    def estimated(*_: object, generator: str | None, **__: object) -> None:
        speakers.append(generator)
        raise UsageError("enough")

    monkeypatch.setattr("loratools.training.transfer.cost.estimated", estimated)
    told = ("transfer", places.adapter, "--from", places.first, "--to", places.second, "-o", tmp_path / "moved")
    for more in ((), ("--seeds", places.seeds), ("--seeds", places.seeds, "--generator", places.chatty)):
        assert run(*told, *more).code == 2
    assert speakers == [str(places.first), None, str(places.chatty)]
