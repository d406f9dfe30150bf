"""Sharded safetensors: one source made of many files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import InputError
from loratools.storage import ShardedSource, open_source

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(3.0), "c": torch.ones(2, 2).bfloat16()}, tmp_path / FIRST)
    save_file({"b": torch.tensor(7), "unlisted": torch.zeros(1)}, tmp_path / SECOND)
    write_index(tmp_path, {"metadata": {"total_size": 28}, "weight_map": {"c": FIRST, "b": SECOND, "a": FIRST}})
    return tmp_path


def write_index(folder: Path, index: Any) -> None:
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / INDEX).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("named", ["index", "folder"])
def test_the_tensors_of_all_shards_are_read(folder: Path, named: str) -> None:
    with open_source(folder if named == "folder" else folder / INDEX) as source:
        assert isinstance(source, ShardedSource)
        assert list(source.specs) == ["c", "b", "a"]
        assert source.specs["c"].dtype == "BF16"
        assert torch.equal(source.read("a"), torch.arange(3.0))
        assert source.read("b") == 7
        assert source.metadata == {"total_size": "28"}
        assert source.unlisted == ("unlisted",)
        with pytest.raises(KeyError):
            source.read("unlisted")
        shards = (folder / FIRST).read_bytes() + (folder / SECOND).read_bytes()
        assert source.sha256() == hashlib.sha256(shards).hexdigest()


def test_an_index_is_recognised_by_its_content(folder: Path) -> None:
    (folder / INDEX).rename(folder / "renamed")
    with open_source(folder / "renamed") as source:
        assert len(source.specs) == 3


def test_shards_may_be_symbolic_links_as_in_a_download_cache(folder: Path) -> None:
    (folder / "blobs").mkdir()
    (folder / FIRST).rename(folder / "blobs" / "0123")
    (folder / FIRST).symlink_to(Path("blobs") / "0123")
    with open_source(folder) as source:
        assert source.read("a").shape == (3,)


def test_reading_after_close_is_an_error(folder: Path) -> None:
    source = open_source(folder)
    source.close()
    with pytest.raises(InputError, match="is closed"):
        source.read("a")


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "C:x",
        "nul\0",
        "line\nbreak",
        3,
        None,
        ["x"],
    ],
)
def test_a_shard_outside_the_folder_is_refused(folder: Path, shard: object) -> None:
    write_index(folder, {"weight_map": {"a": shard}})
    with pytest.raises(
        InputError, match=r"index\.json: places tensor 'a' in .* no plain file name; do not trust"
    ) as error:
        open_source(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "no index of shards"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {"a": "x"}, "metadata": 3}', "no index of shards"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "appears twice"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "missing.safetensors: no such file"),
        ('{"weight_map": {"z": "' + FIRST + '"}}', "lists tensor 'z' in .* which lacks it"),
        ('{"weight_map"', "is no JSON index"),
        ('{"weight_map": {"a": "' + INDEX + '"}}', "is no safetensors file"),
        ('{"a":' + "[" * 100_000, "is no JSON index"),
    ],
)
def test_a_damaged_index_is_an_error_of_one_line(folder: Path, index: str, message: str) -> None:
    write_index(folder, index)
    with pytest.raises(InputError, match=message) as error:
        ShardedSource(folder / INDEX)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_huge_index_is_refused_unread(folder: Path) -> None:
    write_index(folder, '{"weight_map": {"a": "' + "x" * (33 << 20) + '"}}')
    with pytest.raises(InputError, match="larger than any index"):
        open_source(folder)


def test_a_folder_stands_for_its_only_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no tensors; name a file"):
        open_source(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with open_source(tmp_path) as source:
        assert source.container == "pickle"
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    with open_source(tmp_path) as source:
        assert source.container == "safetensors"
    save_file({"a": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match=r"holds 2 candidates \(one.safetensors, two.safetensors\); name one"):
        open_source(tmp_path)
