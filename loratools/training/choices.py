"""Questions with answers to choose from, and how likely a model thinks each of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loratools.errors import InputError, UsageError
from loratools.training.evaluate import Evaluate, Step, losses, refuse_too_long
from loratools.training.lines import read_json, read_lines
from loratools.training.prompts import prompt_ids

Normalise = Literal["none", "tokens", "bytes"]

_FORM = 'give rows such as {"prompt": "...", "choices": ["...", "..."], "answer": 0}, the answer by place or as text'


@dataclass(frozen=True)
class ChoiceRow:
    """A prompt, what may follow it, and the place of the right one among that."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_choices(path: str | os.PathLike[str], limit: int | None = None) -> list[ChoiceRow]:
    """The first `limit` rows of JSON with a prompt, choices and an answer; InputError names lines that are none."""
    return read_lines(path, limit, _row, what="rows", form=_FORM)


def _row(line: str, where: str) -> ChoiceRow:
    fields = read_json(line, where, _FORM)
    if not isinstance(fields, Mapping) or not isinstance(fields.get("prompt"), str) or not fields["prompt"]:
        raise InputError(f"{where}: has no prompt; {_FORM}")
    choices, answer = fields.get("choices"), fields.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise InputError(f"{where}: has no two or more choices of text; {_FORM}")
    if len(set(choices)) < len(choices):
        raise InputError(f"{where}: has the same choice twice; {_FORM}")
    if isinstance(answer, str) and answer in choices:
        return ChoiceRow(fields["prompt"], tuple(choices), choices.index(answer))
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return ChoiceRow(fields["prompt"], tuple(choices), answer)
    raise InputError(f"{where}: its answer is none of its {len(choices)} choices; {_FORM}")


def choice_scores(
    model: Any,
    tokenizer: Any,
    rows: Sequence[ChoiceRow],
    *,
    options: Evaluate = Evaluate(),
    normalise: Normalise = "none",
    step: Step | None = None,
) -> tuple[NDArray[np.float64], int]:
    """(rows, most choices) log-likelihoods of the choices behind their prompts, and how many tokens they have.

    Each over the length of the choice, in tokens or bytes of UTF-8, if so asked; -inf where a row has fewer choices. No
    end token counts. UsageError for a choice that the tokenizer makes nothing of.
    """
    places = [(i, j) for i, row in enumerate(rows) for j in range(len(row.choices))]
    items = []
    for i, j in places:
        ids = prompt_ids(tokenizer, rows[i].prompt, chat=options.chat)
        items.append((ids + list(tokenizer(rows[i].choices[j], add_special_tokens=False).input_ids), len(ids)))
    for (i, j), (ids, start) in zip(places, items, strict=True):
        if len(ids) == start or not start:
            raise UsageError(f"row {i + 1}: the tokenizer makes nothing of {rows[i].choices[j]!r} or of its prompt")
    refuse_too_long(model, [(i, len(ids)) for (i, _), (ids, _) in zip(places, items, strict=True)])
    scores = np.full((len(rows), max(len(row.choices) for row in rows)), -np.inf)
    found = losses(model, items, options=options, step=step)
    for (i, j), loss in zip(places, found, strict=True):
        lengths = {"none": 1, "tokens": loss.tokens, "bytes": len(rows[i].choices[j].encode())}
        scores[i, j] = -loss.nll / lengths[normalise]
    return scores, sum(loss.tokens for loss in found)


def n_choice_batches(rows: Sequence[ChoiceRow], options: Evaluate) -> int:
    """How often `choice_scores` calls its `step`."""
    return -(-sum(len(row.choices) for row in rows) // options.batch)


def shared_classes(rows: Sequence[ChoiceRow]) -> tuple[str, ...] | None:
    """The choices where all rows have the same in the same order, which then are classes; None otherwise."""
    first = rows[0].choices
    return first if all(row.choices == first for row in rows) else None
