"""Rows of text, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.errors import InputError
from loratools.training.texts import read_texts


def test_rows_are_texts_or_prompts_with_answers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n\n{"prompt": "two ", "answer": "three"}\n"four"\n')
    assert read_texts(path) == ["one", "two three", "four"]
    assert read_texts(path, 2) == ["one", "two three"]


def test_a_txt_file_is_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("one\n\n  two\n")
    assert read_texts(path) == ["one", "  two"]


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"{", "line 1: is not JSON"), (b"{}", "line 1: has no text"), (b"3", "has no text"), (b"", "holds no texts"),
     (b"\xff\xfe", "is not UTF-8")],
)  # fmt: skip
def test_anything_else_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_texts(path)
