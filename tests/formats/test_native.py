"""loratools' own dialect: what its metadata may not say, and that what it says is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools.errors import AdapterError, InputError
from loratools.families.base import Layout
from loratools.files import load, save
from loratools.formats.native import UPDATES_KEY, Described, Native
from loratools.ops.reparameterize import Reparameterize, reparameterize

GOOD: dict[str, Any] = {"version": 1, "kinds": [{"targets": ["a"], "shape": [6, 7]}]}


def written(folder: Path, updates: object) -> Path:
    tensors = {"a.down": torch.randn(2, 7), "a.up": torch.randn(6, 2)}
    text = updates if isinstance(updates, str) else json.dumps(updates)
    save_file(tensors, folder / "in.safetensors", {UPDATES_KEY: text})
    return folder / "in.safetensors"


def kind(**changes: object) -> dict[str, Any]:
    return {**GOOD, "kinds": [{**GOOD["kinds"][0], **changes}]}


@pytest.mark.parametrize(
    "updates",
    [
        "{",
        "[" * 100_000,
        "null",
        [],
        {},
        {**GOOD, "version": 2},
        {**GOOD, "kinds": 5},
        {**GOOD, "kinds": [{"shape": [6, 7]}]},
        {**GOOD, "parameters": {"a": 5}},
        {**GOOD, "parameters": []},
        kind(targets=["a", "a"]),
        kind(targets=[5]),
        kind(shape=[]),
        kind(shape=[0, 7]),
        kind(shape=[-6, 7]),
        kind(shape=[True, 7]),
        kind(shape=["6", 7]),
        kind(scale="inf"),
        kind(scale="x"),
        kind(layout={"nonsense": 1}),
        kind(layout=[1]),
        kind(layout={"experts": "many"}),
        kind(layout={"experts": 0}),
        kind(layout={"transposed": 1}),
        kind(layout={"blocks": [[float("inf"), True]]}),
        kind(layout={"shape": 5}),
        kind(shape=[10**9, 10**9]),
        {**GOOD, "kinds": "x"},
        kind(settings=[]),
        kind(shared=[]),
        kind(shared={"slot": "missing"}),
    ],
    ids=str,
)
def test_broken_metadata_are_refused(tmp_path: Path, updates: object) -> None:
    with pytest.raises(InputError, match=r"in\.safetensors"):
        load(written(tmp_path, updates))


def test_a_target_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"in\.safetensors: b"):
        load(written(tmp_path, kind(targets=["a", "b"])))


def test_a_target_cannot_be_named_as_shared_tensors_are() -> None:
    with pytest.raises(AdapterError, match=r"shared\.x"):
        Native.of({"shared.x": Described(Layout())}, {"shared.x": ("down", "up")}, {})


def test_what_it_says_comes_back(tmp_path: Path) -> None:
    stated = kind(scale=-0.5, layout={"transposed": True, "blocks": [[3, True], [3, False]]}, settings={"seed": 7})
    path = written(tmp_path, {**stated, "parameters": {"a": "the.weight"}})
    adapter = load(path)
    assert adapter.format.parameter("a") == "the.weight"
    assert adapter.entries["a"].layout == Layout(transposed=True, blocks=((3, True), (3, False)), shape=(6, 7))
    assert adapter.entries["a"].scale == -0.5
    assert adapter.format.settings("a") == {"seed": 7}
    again = load(save(adapter, tmp_path / "out.safetensors").path)
    assert again.format.described == adapter.format.described  # type: ignore[attr-defined]
    assert json.loads(again.metadata[UPDATES_KEY]) == {**stated, "parameters": {"a": "the.weight"}}


HOSTILE: list[Any] = [None, True, -1, 0.5, 1e300, 2**70, "x", [], {}, [10**9, 10**9], [1], [True, "x"], float("nan")]


@pytest.mark.parametrize("family", ["fourierft", "waveft", "vera", "randlora", "unilora", "tera", "wavelet"])
def test_settings_of_any_other_type_are_refused(family: str, tmp_path: Path) -> None:
    """Every setting in turn is what it cannot be: one line of error, or a number that happens to be allowed."""
    tensors = {"q.lora_A.weight": torch.randn(2, 12), "q.lora_B.weight": torch.randn(16, 2)}
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    options = {"rank": "4"} if family == "randlora" else {}
    how = Reparameterize(options, accept_loss=True)
    saved = save(reparameterize(load(tmp_path / "lora"), family, how)[0], tmp_path / "in.safetensors")
    with safe_open(saved.path, "pt") as file:
        metadata = file.metadata()
    stored, told = load_file(saved.path), json.loads(metadata[UPDATES_KEY])
    settings = told["kinds"][0]["settings"]
    assert settings
    refused = 0
    for name, value in [(name, value) for name in settings for value in HOSTILE]:
        changed = {**told["kinds"][0], "settings": {**settings, name: value}}
        text = json.dumps({**told, "kinds": [changed]})
        save_file(stored, tmp_path / "bad.safetensors", {**metadata, UPDATES_KEY: text})
        try:
            for update in dict(load(tmp_path / "bad.safetensors").items()).values():
                update.delta()
        except AdapterError:
            refused += 1
    assert refused >= len(HOSTILE) - 5
