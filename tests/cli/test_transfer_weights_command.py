"""`loratools transfer --weights-only` between tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.tiny import save_tiny_lora, save_tiny_model, tiny_llama

import loratools

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("models")
    one, two = save_tiny_model(place / "one"), save_tiny_model(place / "two")
    tiny_llama(seed=5).save_pretrained(two)
    return one, two


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lora(tmp_path_factory.mktemp("loras") / "lora")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATOOLS_CACHE", str(tmp_path / "cache"))


def test_to_the_same_base_nothing_changes(run: Run, bases: tuple[Path, Path], lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("transfer", lora, "--from", bases[0], "--to", bases[0], "--weights-only", "-o", out, "--json")
    assert done.code == 0, done.err
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (lora, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert {row["method"] for row in done.json["targets"].values()} == {"same"}
    assert done.json["output"] == str(out / "adapter_model.safetensors") or done.json["output"] == str(out)


@pytest.mark.parametrize("align", ["none", "bases", "activations"])
def test_to_another_base(run: Run, bases: tuple[Path, Path], lora: Path, tmp_path: Path, align: str) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"words and number {i * i}" for i in range(8)))
    more = ("--align", align, *(("--texts", texts) if align == "activations" else ()))
    common = ("transfer", lora, "--from", bases[0], "--to", bases[1], "--weights-only", *more)
    page = tmp_path / "page.html"
    shown = run(*common, "-o", tmp_path / "out", "--report", page)
    assert shown.code == 0, shown.err
    assert '"weights only"' in page.read_text()
    assert run(*common, "-o", tmp_path / "other", "--report", page).code == 5
    assert not (tmp_path / "other").exists()
    *lines, last = shown.out.splitlines()
    assert max(map(len, lines)) <= 80, shown.out
    assert last.startswith("wrote ")
    adapter = loratools.load(tmp_path / "out")
    assert len(adapter) == 14
    assert run("transfer", *common[1:], "-o", tmp_path / "out").code == 5  # exists
    again = run(*common, "-o", tmp_path / "out", "--force", "--json")
    assert again.code == 0
    assert again.json["align"] == align
    assert {"none": "copy", "bases": "bases", "activations": "activations"}[align] in {
        row["method"] for row in again.json["targets"].values()
    }


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--align", "activations"), 2, "--align activations runs some --texts"),
        (("--texts", "t.jsonl"), 2, "--align activations runs some --texts"),
        (("--seeds", "s.jsonl"), 2, "--weights-only makes no use of --seeds; leave that out"),
        (("--rank", "16", "--squeeze-to", "4", "--resume"), 2, "no use of --rank, --squeeze-to, --resume; leave"),
        (
            ("--generator", "x", "--show", "pairs", "--filter", "none", "--chat"),
            2,
            "--generator, --show, --filter, --ch",
        ),
        (("--temperature", "0.5", "--batch", "4"), 2, "makes no use of --temperature, --batch"),
        (("--warm-start",), 2, "makes no use of --warm-start"),
        (("--prepare-only",), 2, "choose one"),
        (("--to", "missing"), 3, "missing"),
    ],
)
def test_mistakes(
    run: Run, bases: tuple[Path, Path], lora: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    out = tmp_path / "out"
    done = run("transfer", lora, "--from", bases[0], "--to", bases[1], "--weights-only", "-o", out, *arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert not out.exists()


def test_alignment_is_for_weights(run: Run, bases: tuple[Path, Path], lora: Path, tmp_path: Path) -> None:
    done = run("transfer", lora, "--from", bases[0], "--to", bases[1], "--align", "none", "-o", tmp_path / "out")
    assert done.code == 2
    assert "--align goes with --weights-only or --warm-start" in done.err
    done = run("transfer", lora, "--from", bases[0], "--weights-only", "-o", tmp_path / "out")
    assert done.code == 2
    assert "name the base to move to" in done.err


def test_a_base_with_nan_is_named(run: Run, bases: tuple[Path, Path], lora: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(bases[1] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_text(json.dumps({"model_type": "llama"}))
    done = run("transfer", lora, "--from", bases[0], "--to", broken, "--weights-only", "-o", tmp_path / "out")
    assert (done.code, done.out) == (4, "")
    assert "model.layers.1.mlp.up_proj" in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
