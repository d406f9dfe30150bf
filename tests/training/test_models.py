"""Folders that hold a part of a model, or something that looks like one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from training.tiny import save_tiny_model

from loratools.errors import InputError
from loratools.training.models import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "base")


def test_a_model_that_lacks_a_weight_does_not_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers would take random numbers for it."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights.*model\.layers\.1\.mlp\.down_proj"):
        load_model(folder)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("file", "fields"),
    [("config", {"hidden_size": 32}), ("config", {"hidden_size": "abc"}), ("tokenizer", {"model": {"type": "?"}})],
)
def test_what_does_not_fit_together_is_an_error_of_one_line(folder: Path, file: str, fields: dict[str, object]) -> None:
    path = folder / f"{file}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(InputError, match=r"base: transformers cannot load it: .+; is the folder complete\?") as error:
        load_model(folder)
    assert "\n" not in str(error.value)
