"""Rows of text, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.errors import InputError, UsageError
from loratools.training.texts import read_texts


def test_rows_are_texts_or_prompts_with_answers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n\n{"prompt": "two ", "answer": "three"}\n"four"\n')
    assert read_texts(path) == ["one", "two three", "four"]
    assert read_texts(path, 2) == ["one", "two three"]


def test_the_mark_that_some_editors_begin_with_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n')
    assert read_texts(path) == ["one"]
    path.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert read_texts(path.with_suffix(".txt")) == ["one"]


@pytest.mark.parametrize("limit", [0, -1])
def test_no_rows_at_all_cannot_be_asked_for(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n')
    with pytest.raises(UsageError, match="at least 1"):
        read_texts(path, limit)


def test_a_txt_file_is_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("one\n\n  two\n")
    assert read_texts(path) == ["one", "  two"]


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"{", "line 1: is not JSON"), (b"{}", "line 1: has no text"), (b"3", "has no text"), (b"", "holds no texts"),
     (b"\xff\xfe", "is not UTF-8"), (b'{"text": "a\\ud800"}', "half of a surrogate pair"),
     (b"[" * 100_000, "line 1: is not JSON")],
)  # fmt: skip
def test_anything_else_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_texts(path)
