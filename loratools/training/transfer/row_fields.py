"""What keeps a row, which anybody may have edited, from being used by a stage; nothing where it can be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Final

from loratools.training.lines import is_unicode


def unfit(row: dict[str, Any]) -> str:
    """Of any row: fields of another kind than the stages write, and text that no tokenizer reads."""
    for name, (fits, kind) in _FIELDS.items():
        if row.get(name) is not None and not fits(row[name]):
            return f'its "{name}" is no {kind}'
    return "" if is_unicode(json.dumps(row, ensure_ascii=False)) else "has half of a surrogate pair, which is no text"


def unaskable(row: dict[str, Any]) -> str:
    """Of an input: nothing to ask, too."""
    return unfit(row) or ("" if row["prompt"].strip() else "its prompt is empty")


def unanswered(row: dict[str, Any]) -> str:
    """Of a labelled row: no answer, too."""
    return unfit(row) or ("" if isinstance(row.get("answer"), str) else "has no answer")


def _is_number(most: float) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most

    return fits


_SHARE: Final = (_is_number(1.0), "number from 0 to 1")
_FIELDS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "id": (lambda value: isinstance(value, int | str), "number or text"),
    "answer": (lambda value: isinstance(value, str), "text"),
    "flaw": (lambda value: isinstance(value, str), "text"),
    "ended": (lambda value: isinstance(value, bool), "true or false"),
    "p": _SHARE,
    "confidence": (_is_number(math.nextafter(math.inf, 0)), "finite number of at least 0"),
    "disagreement": _SHARE,
}
