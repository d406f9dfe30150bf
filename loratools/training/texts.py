"""Rows of text to run a model on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import InputError
from loratools.training.lines import read_json, read_lines

_FORM = 'give rows such as {"text": "..."} or {"prompt": "...", "answer": "..."}, or a .txt file of plain lines'

_LABELLED = 'give rows such as {"adapter": "...", "text": "..."}'
_QUERY = 'give rows such as {"text": "..."}, or a .txt file of plain lines'


@dataclass(frozen=True)
class Labelled:
    """A text, and the adapter that it is for, where that is known."""

    text: str
    adapter: str | None = None


def read_labelled(path: str | os.PathLike[str], *, required: bool = True) -> list[Labelled]:
    """Texts with the adapters that they are for; unless `required`, an adapter may be missing.

    A text is the `text` or the `prompt` of a row of JSON or, where adapters may be missing, a line of a .txt file.
    InputError names a line without a text, with an empty one, or with something else for an adapter.
    """
    if not required and Path(path).suffix == ".txt":
        return [Labelled(text) for text in read_texts(path)]
    form = _LABELLED if required else _QUERY

    def parse(line: str, where: str) -> Labelled:
        row = read_json(line, where, form)
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: is no JSON object; {form}")
        text, adapter = row.get("text", row.get("prompt")), row.get("adapter")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: has no text, or an empty one; {form}")
        if (required or adapter is not None) and not (isinstance(adapter, str) and adapter):
            raise InputError(f"{where}: names no adapter; {form}")
        return Labelled(text, adapter)

    return read_lines(path, None, parse, what="texts", form=form)


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
