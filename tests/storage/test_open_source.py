"""What is no container of tensors is refused with a remedy, at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loratools.errors import InputError
from loratools.storage import SafetensorsSource, open_source


@pytest.mark.parametrize(
    "content", [b"<html>", b"version https://git-lfs.github.com/spec/v1\noid x\n", b"PK\x03\x04", b"\x80\x02"]
)
def test_other_files_are_refused_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    for name in ("x", "x.safetensors", "x.bin", "x.index.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"; \w+") as error:
            open_source(tmp_path / name)
        assert "\n" not in str(error.value)
        assert ("run git lfs pull" in str(error.value)) == content.startswith(b"version")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "pipe", "is no regular file"),
        (Path("/dev/zero"), "is no regular file"),
        (tmp_path / "missing", "no such file; check the path"),
        (tmp_path / "pipe" / "x", "a parent of it is a file"),
        (Path("nul\0byte"), "cannot be opened"),
        (tmp_path / ("x" * 300), "cannot be opened"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            open_source(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        SafetensorsSource(tmp_path)


def test_a_name_that_would_break_the_line_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "two\nlines\x1b[31m.safetensors"
    path.write_bytes(b"")
    with pytest.raises(InputError) as error:
        open_source(path)
    assert str(error.value).isprintable()


def test_a_keras_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.lora.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 100)
    with pytest.raises(InputError, match=r"is an HDF5 file; a \.lora\.h5 of Keras"):
        open_source(tmp_path / "a.lora.h5")
