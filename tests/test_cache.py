"""What is kept of base models between runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from loratools.cache import Cache, content_key, default_cache


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"u": torch.randn(5, 3, generator=generator), "s": torch.rand(3, generator=generator)}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "cache")
    assert cache.read("k") is None
    assert cache.write("k", tensors(), name="q_proj")
    found = cache.read("k")
    assert found is not None
    assert set(found) == {"u", "s"}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())
    (entry,) = cache.entries()
    assert entry.name == "q_proj"
    assert entry.nbytes == entry.path.stat().st_size


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_damaged_files_count_as_absent_and_are_replaced(tmp_path: Path, damage: bytes | None) -> None:
    cache = Cache(tmp_path)
    cache.write("k", tensors(), name="x")
    (entry,) = cache.entries()
    whole = entry.path.read_bytes()
    entry.path.write_bytes(whole[:-7] if damage is None else damage)
    assert cache.read("k") is None
    assert cache.entries()[0].name == "damaged"
    assert cache.write("k", tensors(1), name="x")
    found = cache.read("k")
    assert found is not None
    assert torch.equal(found["u"], tensors(1)["u"])


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    assert not cache.write("k", tensors(), name="x")
    assert cache.read("k") is None
    assert cache.entries() == ()
    assert cache.clear() == 0


def test_clearing_frees_everything_and_nothing_else(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for key in "abc":
        cache.write(key, tensors(), name=key)
    (tmp_path / ".base-x.12345678.tmp").write_bytes(b"12345")
    (tmp_path / "mine.txt").write_text("keep")
    size = sum(entry.nbytes for entry in cache.entries()) + 5
    assert cache.clear() == size
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert cache.clear() == 0


def test_a_name_is_shown_as_it_is_stored(tmp_path: Path) -> None:
    Cache(tmp_path).write("k", tensors(), name="a\nb\x1b[31m")
    assert Cache(tmp_path).entries()[0].name == "a\nb\x1b[31m"


def test_keys_stand_for_content() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 5000, generator=generator)  # several chunks
    key = content_key(weight, "basis")
    assert key == content_key(weight.clone(), "basis") == content_key(weight.T.contiguous().T, "basis")
    others = [
        content_key(weight, "other"),
        content_key(weight.reshape(5000, 300), "basis"),
        content_key(weight.half(), "basis"),
        content_key(weight.view(torch.int32), "basis"),
    ]
    last = weight.clone()
    last[-1, -1] += 1
    others.append(content_key(last, "basis"))
    assert len({key, *others}) == 6


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORATOOLS_CACHE", str(tmp_path / "a"))
    assert default_cache().folder == tmp_path / "a"
    monkeypatch.delenv("LORATOOLS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_cache().folder == tmp_path / "b" / "loratools"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert default_cache().folder == tmp_path / "c" / ".cache" / "loratools"


def test_processes_may_share_a_folder(tmp_path: Path) -> None:
    """Writers and readers of one key at once: every read gives nothing or all of it."""
    code = (
        "import sys, torch; from pathlib import Path; from loratools.cache import Cache\n"
        "cache = Cache(Path(sys.argv[1]))\n"
        "for _ in range(40):\n"
        "    x = {'u': torch.full((200, 200), 7.0)}\n"
        "    assert cache.write('k', x, name='x')\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=os.environ.copy()) for _ in range(2)]
    wrong: list[object] = []
    seen = threading.Event()
    while any(writer.poll() is None for writer in writers):
        found = Cache(tmp_path).read("k")
        if found is not None:
            seen.set()
            if not torch.equal(found["u"], torch.full((200, 200), 7.0)):
                wrong.append(found)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen.is_set()
    assert not wrong
    assert len(list(tmp_path.iterdir())) == 1
