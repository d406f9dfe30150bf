"""Rows of text to run a model on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from loratools.errors import InputError
from loratools.training.lines import read_json, read_lines

_FORM = 'give rows such as {"text": "..."} or {"prompt": "...", "answer": "..."}, or a .txt file of plain lines'


def read_texts(path: str | os.PathLike[str], limit: int | None = None) -> list[str]:
    """The first `limit` texts: rows of JSON with a text, or a prompt and an answer, or the lines of a .txt file."""
    parse = _plain if Path(path).suffix == ".txt" else _text
    return read_lines(path, limit, parse, what="texts", form=_FORM)


def _plain(line: str, where: str) -> str:
    return line.rstrip("\n")


def _text(line: str, where: str) -> str:
    row = read_json(line, where, _FORM)
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        if isinstance(row.get("text"), str):
            return str(row["text"])
        if isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str):
            return f"{row['prompt']}{row['answer']}"
    raise InputError(f"{where}: has no text; {_FORM}")
