"""How well a model answers: the likelihood of the answers of a task, and how often its own are the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import InputError, UsageError
from loratools.reports.evaluate import Evaluation
from loratools.training.applied import applied
from loratools.training.lines import read_json, read_lines
from loratools.training.prompts import collated, encoded, pad_id, prompt_ids

if TYPE_CHECKING:
    from loratools.adapter import Adapter

_FORM = 'give rows such as {"prompt": "...", "answer": "..."}'


@dataclass(frozen=True)
class Row:
    """A prompt, which may be empty, and the answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Evaluate:
    """How many rows, how many at once, and how many tokens an answer of the model may have.

    `chat` puts prompts into the tokenizer's chat template; otherwise the answer follows the prompt as it is. `match`:
    whether the model answers at all, which takes most of the time.
    """

    max_rows: int | None = None
    batch: int = 16
    max_tokens: int = 64
    device: str = "cpu"
    chat: bool = False
    match: bool = True

    def __post_init__(self) -> None:
        for name in ("max_rows", "batch", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")


def read_rows(path: str | os.PathLike[str], limit: int | None = None) -> list[Row]:
    """The first `limit` rows of JSON with a prompt and an answer; InputError names the line that is none."""
    return read_lines(path, limit, _row, what="rows", form=_FORM)


def _row(line: str, where: str) -> Row:
    fields = read_json(line, where, _FORM)
    if isinstance(fields, Mapping):
        prompt, answer = fields.get("prompt"), fields.get("answer")
        if isinstance(prompt, str) and isinstance(answer, str) and answer:
            return Row(prompt, answer)
    raise InputError(f"{where}: has no prompt and answer; {_FORM}")


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    adapter: Adapter | None = None,
    *,
    options: Evaluate = Evaluate(),
    step: Callable[[], None] | None = None,
) -> Evaluation:
    """How `model`, with `adapter` added to its weights meanwhile, does the task of `rows`.

    Deterministic: the model is put into its evaluation mode and back, and answers greedily. `step` is called after each
    batch. Raises UsageError where there are no rows, or a row has no token that could be foretold.
    """
    chosen = list(rows[: options.max_rows])
    if not chosen:
        raise UsageError(f"there are no rows to evaluate; {_FORM}")
    with _evaluating(model, adapter):
        nll, tokens = answer_nll(model, tokenizer, chosen, options=options, step=step)
        matched = exact_match(model, tokenizer, chosen, options=options, step=step) if options.match else None
    return Evaluation(nll, matched, len(chosen), tokens)


@contextmanager
def _evaluating(model: Any, adapter: Adapter | None) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        if adapter is None:
            yield
        else:
            with applied(model, adapter):
                yield
    finally:
        model.train(was_training)


def answer_nll(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    options: Evaluate = Evaluate(),
    step: Callable[[], None] | None = None,
) -> tuple[float, int]:
    """The mean negative log-likelihood of the tokens of all answers, and how many they are.

    An end token, where the tokenizer has one, belongs to the answer to a prompt; without a prompt the first token
    counts for nothing, for nothing foretells it.
    """
    items = sorted(
        (encoded(tokenizer, row.prompt, row.answer, chat=options.chat) for row in rows), key=lambda item: len(item[0])
    )
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(items), options.batch):
            ids, mask, wanted = collated(items[start : start + options.batch], options.device)
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            kept = wanted[:, 1:]
            losses = torch.nn.functional.cross_entropy(logits[kept].float(), ids[:, 1:][kept], reduction="none")
            total += float(losses.double().sum())
            count += int(kept.sum())
            if step is not None:
                step()
    if not count:
        raise UsageError("the answers have no token that could be foretold; give prompts, or longer answers")
    return total / count, count


def exact_match(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    options: Evaluate = Evaluate(),
    step: Callable[[], None] | None = None,
) -> float | None:
    """The share of the rows with a prompt whose greedy answer is theirs, but for blanks around it; None without any.

    Prompts of one length go together, so that there is no padding, which changes the last digits.
    """
    groups: dict[int, list[tuple[list[int], str]]] = {}
    for row in rows:
        if row.prompt:
            asked = prompt_ids(tokenizer, row.prompt, chat=options.chat)
            groups.setdefault(len(asked), []).append((asked, row.answer))
    hits, end = 0, tokenizer.eos_token_id
    with torch.no_grad():
        for length, group in sorted(groups.items()):
            for start in range(0, len(group), options.batch):
                part = group[start : start + options.batch]
                ids = torch.tensor([prompt for prompt, _ in part], device=options.device)
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=options.max_tokens,
                    do_sample=False,
                    num_beams=1,
                    eos_token_id=end,
                    pad_token_id=pad_id(tokenizer),
                )
                for (_, answer), tokens in zip(part, out[:, length:].tolist(), strict=True):
                    said = tokenizer.decode(tokens, skip_special_tokens=True)
                    hits += said.strip() == answer.strip()
                if step is not None:
                    step()
    count = sum(map(len, groups.values()))
    return hits / count if count else None


def n_steps(tokenizer: Any, rows: Sequence[Row], options: Evaluate) -> int:
    """How often `evaluate` calls its `step`."""
    chosen = rows[: options.max_rows]
    lengths = [
        len(prompt_ids(tokenizer, row.prompt, chat=options.chat)) for row in chosen if row.prompt and options.match
    ]
    batches = -(-len(chosen) // options.batch)
    return batches + sum(-(-lengths.count(length) // options.batch) for length in set(lengths))
