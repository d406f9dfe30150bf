"""loratools' own dialect: what its metadata may not say, and that what it says is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import AdapterError, InputError
from loratools.families.base import Layout
from loratools.files import load, save
from loratools.formats.native import UPDATES_KEY, Described, Native

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
