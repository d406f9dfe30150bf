"""Rows of text to run a model on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.errors import InputError
from loratools.storage.atomic import printable

_FORM = 'give rows such as {"text": "..."} or {"prompt": "...", "answer": "..."}, or a .txt file of plain lines'


def read_texts(path: str | os.PathLike[str], limit: int | None = None) -> list[str]:
    """The first `limit` texts: rows of JSON with a text, or a prompt and an answer, or the lines of a .txt file."""
    place = Path(path)
    name = printable(place)
    plain = place.suffix == ".txt"
    texts: list[str] = []
    try:
        with place.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(texts) >= limit:
                    break
                if line.strip():
                    texts.append(line.rstrip("\n") if plain else _text(line, f"{name}, line {number}"))
    except UnicodeDecodeError:
        raise InputError(f"{name}: is not UTF-8 text; {_FORM}") from None
    if not texts:
        raise InputError(f"{name}: holds no texts; {_FORM}")
    return texts


def _text(line: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError:
        raise InputError(f"{where}: is not JSON; {_FORM}") from None
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        if isinstance(row.get("text"), str):
            return str(row["text"])
        if isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str):
            return f"{row['prompt']}{row['answer']}"
    raise InputError(f"{where}: has no text; {_FORM}")
