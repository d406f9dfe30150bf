"""What a walk finds, and what it does not follow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hub.conftest import write_kohya, write_peft

from loratools.errors import InputError
from loratools.hub.discover import Found, Refused, discover


def names(hub: Path, **more: Path) -> tuple[list[str], list[str]]:
    found = list(discover(hub, **more))
    return [f.name for f in found if isinstance(f, Found)], [f.name for f in found if isinstance(f, Refused)]


def test_folders_and_files_at_any_depth(tmp_path: Path) -> None:
    write_peft(tmp_path / "b", 0)
    write_peft(tmp_path / "b" / "second", 1)
    write_kohya(tmp_path / "a" / "x.safetensors", 2)
    write_kohya(tmp_path / "a" / "y.bin", 3)
    write_kohya(tmp_path / ".hidden" / "z.safetensors", 4)
    (tmp_path / "b" / "training.pt").write_bytes(b"beside an adapter")
    (tmp_path / "readme.md").write_text("text")
    assert names(tmp_path) == (["a/x.safetensors", "a/y.bin", "b", "b/second"], [])
    assert names(tmp_path, without=tmp_path / "a") == (["b", "b/second"], [])


def test_links_are_contained(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    write_kohya(hub / "x.safetensors", 0)
    outside = write_kohya(tmp_path / "outside.safetensors", 1)
    os.symlink(hub, hub / "loop")
    os.symlink(outside, hub / "out.safetensors")
    os.symlink(tmp_path, hub / "up")
    os.symlink(hub / "nowhere", hub / "dangling.safetensors")
    os.symlink("self.safetensors", hub / "self.safetensors")
    os.symlink(hub / "x.safetensors", hub / "alias.safetensors")
    found, refused = names(hub)
    assert found == ["alias.safetensors", "x.safetensors"]
    assert refused == ["dangling.safetensors", "loop", "out.safetensors", "self.safetensors", "up"]


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        list(discover(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="no folder"):
        list(discover(tmp_path / "file"))
