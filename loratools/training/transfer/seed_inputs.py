"""The few real inputs of a task that a transfer starts from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from loratools.errors import InputError
from loratools.training.lines import read_json, read_lines

_FORM = 'give rows such as {"prompt": "..."}, with an "answer" if there is one'


@dataclass(frozen=True)
class Seed:
    """An input of the task, and the answer to it where that is known."""

    prompt: str
    answer: str | None = None


def read_seeds(path: str | os.PathLike[str]) -> list[Seed]:
    """The different inputs of a file of rows with a prompt, an input or a text; InputError where there are none."""
    found = read_lines(path, None, _seed, what="seeds", form=_FORM)
    different: dict[str, Seed] = {}
    for seed in found:
        different.setdefault(seed.prompt, seed)
    return list(different.values())


def _seed(line: str, where: str) -> Seed:
    row = read_json(line, where, _FORM)
    if isinstance(row, str) and row.strip():
        return Seed(row)
    if isinstance(row, Mapping):
        prompt = next((row[key] for key in ("prompt", "input", "text") if isinstance(row.get(key), str)), "")
        answer = row.get("answer", row.get("output"))
        if prompt.strip():
            return Seed(prompt, answer if isinstance(answer, str) else None)
    raise InputError(f"{where}: has no prompt; {_FORM}")
