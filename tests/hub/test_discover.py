"""What a walk finds, and what it does not follow."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

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


def test_a_folder_that_cannot_be_read_costs_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, name in enumerate(("a", "closed/b", "z")):
        write_peft(tmp_path / name, i)
    scandir = os.scandir

    def closed(path: Path) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert names(tmp_path) == (["a", "z"], ["closed"])
    with pytest.raises(InputError, match="closed: cannot be read: Permission denied"):
        list(discover(tmp_path / "closed"))


def test_folders_without_end_are_refused(tmp_path: Path) -> None:
    """Deeper than the stack of the interpreter."""
    write_peft(tmp_path / "good", 0)
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(1200):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
    finally:
        os.close(here)
    found, refused = names(tmp_path)
    assert found == ["good"]
    assert refused == ["/".join("d" * 65)]
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        list(discover(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="no folder"):
        list(discover(tmp_path / "file"))
