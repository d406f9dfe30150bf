"""`loratools eval`: the base, adapters and their ranks on small tasks."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.tiny import save_tiny_lora, save_tiny_model

import loratools
from loratools.training.evaluate import Evaluate, evaluate, read_rows
from loratools.training.models import load_model
from loratools_cli.progress import Progress

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lora(tmp_path_factory.mktemp("loras") / "lora", rank=8)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    text = "".join(json.dumps({"prompt": f"number {i}", "answer": f" {i + 1}"}) + "\n" for i in range(6))
    (tmp_path / "rows.jsonl").write_text(text)
    return tmp_path / "rows.jsonl"


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    made = [{"prompt": f"number {i}", "choices": [" odd", " even"], "answer": i % 2} for i in range(12)]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return tmp_path / "quiz.jsonl"


def test_the_base_and_an_adapter(run: Run, base: Path, lora: Path, rows: Path, tmp_path: Path) -> None:
    table = tmp_path / "out.csv"
    done = run("eval", "none", lora, "--base", base, "--data", rows, "--max-tokens", 3, "--resamples", 50,
               "--table", table, "--json")  # fmt: skip
    assert done.code == 0, done.err
    model, tokenizer = load_model(base)
    for held, found in zip((None, loratools.load(lora)), done.json["runs"], strict=True):
        expected = evaluate(model, tokenizer, read_rows(rows), held, options=Evaluate(max_tokens=3))
        assert found["measures"]["nll"]["value"] == pytest.approx(expected.nll, rel=1e-9)
        assert found["measures"]["exact_match"]["value"] == expected.exact_match
    assert (done.json["metric"], done.json["rows_read"], done.json["dtype"]) == ("exact", 6, "float32")
    lines = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [(line["run"], line["measure"]) for line in lines] == [
        (name, measure) for name in ("none", str(lora)) for measure in ("exact_match", "nll", "perplexity")
    ]
    assert lines[0]["difference"] == ""
    assert float(lines[4]["difference"]) == done.json["runs"][1]["differences"]["nll"]["value"]
    again = run("eval", "none", lora, "--base", base, "--data", rows, "--max-tokens", 3, "--resamples", 50, "--json")
    assert again.out == done.out


def test_what_people_read_fits_80_columns(run: Run, base: Path, lora: Path, quiz: Path, rows: Path) -> None:
    common = ("--base", base, "--resamples", 20)
    shown = run("eval", lora, "none", "--data", quiz, "--calibration", "--normalise", "bytes", "--all", *common)
    assert shown.code == 0, shown.err
    assert max(map(len, shown.out.splitlines())) <= 80, shown.out
    for word in ("accuracy %", "ECE at T", "classwise ECE", "temperature", "20 draws", "bytes"):
        assert word in shown.out
    ranks = run("eval", lora, "--data", rows, "--ranks", "1,2,8", "--slice", "dylora", "--metric", "nll", *common)
    assert ranks.code == 0, ranks.err
    assert max(map(len, ranks.out.splitlines())) <= 80, ranks.out
    assert "AURAC v1" in ranks.out
    assert "slices, scale dylora" in ranks.out
    assert "rank 8 is the adapter as it is" in ranks.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--slice", "keep"), 2, "--slice says how to cut to --ranks"),
        (("--ranks", "1,x"), 2, "give whole numbers"),
        (("--ranks", "0,1"), 2, "give different ranks of at least 1"),
        (("--ranks", ""), 2, "give whole numbers"),
        (("--normalise", "bytes"), 2, "--normalise is for choices"),
        (("--metric", "choice"), 3, "line 1: has no two or more choices"),
        (("--metric", "nll", "--calibration"), 2, "--calibration needs exact or choice"),
        (("--bins", "0"), 2, "bins must be at least 1"),
        (("--bins", "7"), 2, "--temperature are of --calibration; give that too"),
        (("--max-rows", "0"), 2, "max_rows must be at least 1"),
        (("--table", "x.xls"), 2, "a table is written as"),
    ],
)
def test_mistakes(
    run: Run, base: Path, lora: Path, rows: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = run("eval", lora, "--base", base, "--data", rows, *arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_warnings_of_an_adapter_that_is_cut_are_told(
    run: Run, base: Path, lora: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "bare.safetensors").write_bytes((lora / "adapter_model.safetensors").read_bytes())
    done = run("eval", tmp_path / "bare.safetensors", "--base", base, "--data", rows, "--ranks", "1")
    assert (done.code, "alpha is unknown" in done.err) == (0, True)


def test_ranks_are_of_one_adapter(run: Run, base: Path, lora: Path, rows: Path) -> None:
    for adapters in ((lora, "none"), ("none",)):
        done = run("eval", *adapters, "--base", base, "--data", rows, "--ranks", "1,2")
        assert done.code == 2
        assert "--ranks cuts one adapter" in done.err


def test_nothing_is_downloaded(
    run: Run, lora: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("eval", "none", "--base", "someone/some-model", "--data", rows)
    assert done.code == 3
    assert "pass --allow-download" in done.err
    (tmp_path / "empty").mkdir()
    done = run("eval", "none", "--base", tmp_path / "empty", "--data", rows, "--allow-download")
    assert done.code == 3
    import transformers

    asked: list[tuple[str, bool]] = []

    def refuse(name: str, *, local_files_only: bool, **_: object) -> None:
        asked.append((name, local_files_only))
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    done = run("eval", "none", "--base", "someone/some-model", "--data", rows, "--allow-download")
    assert done.code == 3
    assert "no network" in done.err
    assert asked == [("someone/some-model", False)]


def test_another_base_is_named(run: Run, lora: Path, base: Path, rows: Path, tmp_path: Path) -> None:
    bigger = save_tiny_lora(tmp_path / "other", rank=2, modules=("q_proj",))
    config = json.loads((bigger / "adapter_config.json").read_text())
    from safetensors.torch import load_file, save_file

    tensors = {
        k.replace("layers.1.", "layers.7."): t for k, t in load_file(bigger / "adapter_model.safetensors").items()
    }
    save_file(tensors, bigger / "adapter_model.safetensors")
    (bigger / "adapter_config.json").write_text(json.dumps(config))
    done = run("eval", bigger, "--base", base, "--data", rows)
    assert done.code == 4
    assert "model.layers.7.self_attn.q_proj: the model has no parameter for it" in done.err


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_tells_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = Terminal()
    with Progress(stream=stream, silent=0.0) as progress:
        step = progress.meter(10, "batches")
        now[0] += 20
        step(400)
        assert stream.getvalue().endswith("1 of 10 batches, 20 tokens/s, 3 min left")
        now[0] += 20
        step(0)
        assert "2 of 10 batches, 10 tokens/s, 3 min left" in stream.getvalue()
        count = progress.steps(3, "points")
        now[0] += 1
        count()
        assert stream.getvalue().rstrip().endswith("1 of 3 points")
