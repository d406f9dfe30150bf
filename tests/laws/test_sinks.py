"""Laws of every sink: the destination is complete or untouched, whatever happens while it is written."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import OutputError
from loratools.storage import SafetensorsSink, TensorSink


def safetensors_without_reserve(path: Path) -> TensorSink:
    return SafetensorsSink(path)


def safetensors_with_reserve(path: Path) -> TensorSink:
    return SafetensorsSink(path, reserve=1 << 16)


# How to open it, and the reference that reads what it wrote.
SINKS: dict[str, tuple[Callable[[Path], TensorSink], Callable[[Path], dict[str, torch.Tensor]]]] = {
    "safetensors": (safetensors_without_reserve, load_file),
    "safetensors, reserve": (safetensors_with_reserve, load_file),
}

TENSORS = {
    "first": torch.arange(100_000, dtype=torch.float32),
    "second": torch.arange(6, dtype=torch.int16).reshape(2, 3).T,
    "scalar": torch.tensor(True),
    "empty": torch.zeros(3, 0, dtype=torch.bfloat16),
}


@pytest.fixture(params=SINKS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sink_at(kind: str) -> Callable[[Path], TensorSink]:
    return SINKS[kind][0]


def fill(sink: TensorSink) -> None:
    for name, tensor in TENSORS.items():
        sink.write(name, tensor)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_the_reference_reads_what_was_written(tmp_path: Path, kind: str) -> None:
    open_sink, reference = SINKS[kind]
    with open_sink(tmp_path / "x") as sink:
        fill(sink)
        size = sink.commit({"k": "v"})
    assert os.listdir(tmp_path) == ["x"]
    assert size == (tmp_path / "x").stat().st_size
    loaded = reference(tmp_path / "x")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_the_same_writes_make_the_same_bytes(tmp_path: Path, sink_at: Callable[[Path], TensorSink]) -> None:
    for name, metadata in [("x", {"a": "1", "b": "2"}), ("y", {"b": "2", "a": "1"})]:
        with sink_at(tmp_path / name) as sink:
            fill(sink)
            sink.commit(metadata)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_the_destination_is_untouched_before_commit(tmp_path: Path, sink_at: Callable[[Path], TensorSink]) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with sink_at(tmp_path / "old") as old, sink_at(tmp_path / "new") as new:
        fill(old)
        fill(new)
        assert (tmp_path / "old").read_bytes() == b"old"
        assert not (tmp_path / "new").exists()
        old.commit({})
        assert (tmp_path / "old").stat().st_size > 400_000
        assert not (tmp_path / "new").exists()
    assert os.listdir(tmp_path) == ["old"]


@pytest.mark.parametrize("where", ["x", "old", "made/by/us/x"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
def test_leaving_without_commit_leaves_no_trace(
    tmp_path: Path, sink_at: Callable[[Path], TensorSink], error: type[BaseException] | None, where: str
) -> None:
    (tmp_path / "old").write_bytes(b"old")
    before = snapshot(tmp_path)
    with contextlib.suppress(*([error] if error else [])), sink_at(tmp_path / where) as sink:
        fill(sink)
        if error:
            raise error
    assert snapshot(tmp_path) == before


def test_abort_may_come_twice_and_after_commit(tmp_path: Path, sink_at: Callable[[Path], TensorSink]) -> None:
    sink = sink_at(tmp_path / "a" / "x")
    sink.abort()
    sink.abort()
    assert not list(tmp_path.iterdir())
    sink = sink_at(tmp_path / "a" / "x")
    fill(sink)
    sink.commit({})
    sink.abort()
    assert os.listdir(tmp_path / "a") == ["x"]


def test_parents_that_others_use_meanwhile_stay(tmp_path: Path, sink_at: Callable[[Path], TensorSink]) -> None:
    with sink_at(tmp_path / "a" / "b" / "x"):
        (tmp_path / "a" / "note").write_text("mine")
    assert snapshot(tmp_path) == {"a": None, os.path.join("a", "note"): b"mine"}


def test_a_relative_destination_survives_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink_at: Callable[[Path], TensorSink]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with sink_at(Path("x")) as sink:
        monkeypatch.chdir(tmp_path / "elsewhere")
        sink.commit({})
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "x"]
    assert os.listdir(tmp_path / "elsewhere") == []


CALLS = ["open", "pwrite", "pread", "ftruncate", "fsync", "close", "replace"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", CALLS)
def test_any_system_call_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink_at: Callable[[Path], TensorSink], call: str, number: int
) -> None:
    for turn in range(1, 9):
        (tmp_path / "x").write_bytes(b"old")
        with failing(monkeypatch, call, turn, OSError(number, os.strerror(number))) as failed:
            message = outcome(sink_at, tmp_path / "x")
        assert os.listdir(tmp_path) == ["x"]
        if not failed:
            assert load_file(tmp_path / "x").keys() == TENSORS.keys()
            return
        if message is None:  # the file was in place already, only the folder could not be synced
            assert call in ("open", "fsync", "close")
            assert load_file(tmp_path / "x").keys() == TENSORS.keys()
        else:
            assert (tmp_path / "x").read_bytes() == b"old"
            assert message.startswith(f"{tmp_path / 'x'}: cannot be written: ")
            assert "; " in message
            assert "\n" not in message
    pytest.fail(f"os.{call} is called more often than expected")


@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_may_come_in_any_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink_at: Callable[[Path], TensorSink], call: str
) -> None:
    for turn in range(1, 9):
        (tmp_path / "x").write_bytes(b"old")
        with failing(monkeypatch, call, turn, KeyboardInterrupt()) as failed, contextlib.suppress(KeyboardInterrupt):
            outcome(sink_at, tmp_path / "x")
        assert os.listdir(tmp_path) == ["x"]
        if (tmp_path / "x").read_bytes() != b"old":
            assert load_file(tmp_path / "x").keys() == TENSORS.keys()
        if not failed:
            return


def outcome(sink_at: Callable[[Path], TensorSink], path: Path) -> str | None:
    try:
        with sink_at(path) as sink:
            fill(sink)
            sink.commit({})
    except OutputError as error:
        return str(error)
    return None


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, call: str, turn: int, error: BaseException) -> Iterator[list[bool]]:
    """Let the `turn`-th call of `os.<call>` fail, and those after it succeed."""
    original = getattr(os, call)
    count, failed = 0, []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == turn:
            failed.append(True)
            raise error
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, wrapper)
        yield failed


def test_short_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink_at: Callable[[Path], TensorSink]
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(1, len(data) // 2)], offset))
    assert outcome(sink_at, tmp_path / "x") is None
    assert torch.equal(load_file(tmp_path / "x")["first"], TENSORS["first"])


def test_a_failed_write_may_be_followed_by_a_smaller_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink_at: Callable[[Path], TensorSink]
) -> None:
    with sink_at(tmp_path / "x") as sink:
        sink.write("first", TENSORS["first"])
        with failing(monkeypatch, "pwrite", 1, OSError(errno.ENOSPC, "full")), pytest.raises(OutputError):
            sink.write("large", torch.zeros(1000))
        sink.write("scalar", TENSORS["scalar"])
        sink.commit({})
    assert load_file(tmp_path / "x").keys() == {"first", "scalar"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("folder", "is a folder; add a file name"),
        ("link-to-folder", "is a folder; add a file name"),
        ("pipe", "is a device or a pipe; name a regular file"),
        ("/dev/null", "is a device or a pipe; name a regular file"),
        ("file/x", "a parent of it is a file; choose another path"),
        ("file/made/x", "a parent of it is a file; choose another path"),
        ("/proc/loratools/x", "cannot be written: its folder cannot be created here; write elsewhere"),
        ("x" * 300, "the name is too long; choose a shorter one"),
        ("made/" + "x" * 300, "the name is too long; choose a shorter one"),
        ("dangling/x", "cannot be written: its folder cannot be created here; write elsewhere"),
    ],
)
def test_an_impossible_destination_is_refused_at_once(
    tmp_path: Path, sink_at: Callable[[Path], TensorSink], place: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link-to-folder").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputError) as error:
        sink_at(tmp_path / place)
    assert str(error.value).startswith(f"{tmp_path / place}: ")
    assert str(error.value).endswith(message)
    assert sorted(os.listdir(tmp_path)) == before
    assert os.path.exists("/dev/null")


def test_a_read_only_folder_is_refused_at_once(tmp_path: Path, sink_at: Callable[[Path], TensorSink]) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("root may write to a read-only folder")
    with pytest.raises(OutputError, match="permission denied; write to a folder of your own"):
        sink_at(tmp_path / "locked" / "made" / "x")


def test_a_long_name_that_the_file_system_takes_is_taken(tmp_path: Path, sink_at: Callable[[Path], TensorSink]) -> None:
    name = "😀" * 63
    with sink_at(tmp_path / name) as sink:
        sink.commit({})
    assert os.listdir(tmp_path) == [name]
