"""Files of one row to a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from loratools.errors import InputError, UsageError
from loratools.storage.atomic import printable

T = TypeVar("T")

_NAMED = 5  # of lines that are refused


def read_lines(
    path: str | os.PathLike[str], limit: int | None, parse: Callable[[str, str], T], *, what: str, form: str
) -> list[T]:
    """parse(line, where) of the first `limit` lines that are not blank.

    InputError for a file that is no text, or holds none; `what` the lines are and which `form` would do are said. Of
    lines that `parse` refuses, the first few are named, with what is wrong with each.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the first {limit} {what}: give a number of at least 1")
    place = Path(path)
    name = printable(place)
    found: list[T] = []
    refused: list[str] = []
    try:
        with place.open(encoding="utf-8-sig") as file:  # some editors begin with a mark
            for number, line in enumerate(file, 1):
                if (limit is not None and len(found) + len(refused) >= limit) or len(refused) >= _NAMED:
                    break
                if line.strip():
                    try:
                        found.append(parse(line, f"line {number}"))
                    except InputError as error:
                        refused.append(str(error).removesuffix(f"; {form}"))
    except UnicodeDecodeError:
        raise InputError(f"{name}: is not UTF-8 text; {form}") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}; {form}") from None
    if refused:
        raise InputError(f"{name}, {'; '.join(refused)}{'; and so on' if len(refused) >= _NAMED else ''}; {form}")
    if not found:
        raise InputError(f"{name}: holds no {what}; {form}")
    return found


def read_json(line: str, where: str, form: str) -> Any:
    """The value of a line; InputError where it is not JSON, or holds what no tokenizer can read."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: is not JSON; {form}") from None
    if not is_unicode(json.dumps(found, ensure_ascii=False)):
        raise InputError(f"{where}: has half of a surrogate pair, which is no character; {form}")
    return found


def is_unicode(text: str) -> bool:
    """Whether a text is one that UTF-8 can hold: what JSON or the shell says may have lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
