"""Files of one row to a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from loratools.errors import InputError
from loratools.storage.atomic import printable

T = TypeVar("T")


def read_lines(
    path: str | os.PathLike[str], limit: int | None, parse: Callable[[str, str], T], *, what: str, form: str
) -> list[T]:
    """parse(line, where) of the first `limit` lines that are not blank.

    InputError for a file that is no text, or holds none; `what` the lines are and which `form` would do are said.
    """
    place = Path(path)
    name = printable(place)
    found: list[T] = []
    try:
        with place.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(found) >= limit:
                    break
                if line.strip():
                    found.append(parse(line, f"{name}, line {number}"))
    except UnicodeDecodeError:
        raise InputError(f"{name}: is not UTF-8 text; {form}") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}; {form}") from None
    if not found:
        raise InputError(f"{name}: holds no {what}; {form}")
    return found


def read_json(line: str, where: str, form: str) -> Any:
    """The value of a line; InputError where it is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        raise InputError(f"{where}: is not JSON; {form}") from None
