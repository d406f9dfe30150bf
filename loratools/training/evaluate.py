"""How well a model answers: the likelihood of the answers of a task, and how often its own are the same."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import AdapterError, InputError, UsageError
from loratools.reports.evaluate import Evaluation
from loratools.training.agreement import answer_logits
from loratools.training.applied import applied
from loratools.training.generating import end_ids, generating
from loratools.training.lines import read_json, read_lines
from loratools.training.models import library, room
from loratools.training.prompts import Encoded, encoded, prompt_ids

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter

FORM = 'give rows such as {"prompt": "...", "answer": "..."}'
Step = Callable[[int], object]  # is told how many tokens a batch had


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
    return read_lines(path, limit, _row, what="rows", form=FORM)


def _row(line: str, where: str) -> Row:
    fields = read_json(line, where, FORM)
    if isinstance(fields, Mapping):
        prompt, answer = fields.get("prompt"), fields.get("answer")
        if isinstance(prompt, str) and isinstance(answer, str) and answer:
            return Row(prompt, answer)
    raise InputError(f"{where}: has no prompt and answer; {FORM}")


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    adapter: Adapter | None = None,
    *,
    options: Evaluate = Evaluate(),
    step: Step | None = None,
) -> Evaluation:
    """How `model`, with `adapter` added to its weights meanwhile, does the task of `rows`.

    Deterministic: the model is put into its evaluation mode and back, and answers greedily. `step` is called after each
    batch, with its tokens. Raises UsageError where there are no rows, or a row has no token that could be foretold.
    """
    chosen = list(rows[: options.max_rows])
    if not chosen:
        raise UsageError(f"there are no rows to evaluate; {FORM}")
    with evaluating(model, adapter):
        nll, tokens = answer_nll(model, tokenizer, chosen, options=options, step=step)
        matched = exact_match(model, tokenizer, chosen, options=options, step=step) if options.match else None
    return Evaluation(nll, matched, len(chosen), tokens)


@contextmanager
def evaluating(model: Any, adapter: Adapter | None) -> Iterator[None]:
    """The model in its evaluation mode, with the adapter if there is one; afterwards as it was."""
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
    step: Step | None = None,
) -> tuple[float, int]:
    """The mean negative log-likelihood of the tokens of all answers, and how many they are.

    An end token, where the tokenizer has one, belongs to the answer to a prompt; without a prompt the first token
    counts for nothing, for nothing foretells it.
    """
    found = answer_losses(model, tokenizer, rows, options=options, step=step)
    total, count = math.fsum(loss.nll for loss in found), sum(loss.tokens for loss in found)
    if not count:
        raise UsageError("the answers have no token that could be foretold; give prompts, or longer answers")
    return total / count, count


@dataclass(frozen=True)
class Loss:
    """The negative log-likelihood, in nats, of the tokens of one answer together."""

    nll: float
    tokens: int


def answer_losses(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, options: Evaluate = Evaluate(), step: Step | None = None
) -> list[Loss]:
    """As `answer_nll`, of each row by itself."""
    items = [encoded(tokenizer, row.prompt, row.answer, chat=options.chat) for row in rows]
    refuse_too_long(model, [(i, len(ids)) for i, (ids, _) in enumerate(items)])
    return losses(model, items, options=options, step=step)


def refuse_too_long(model: Any, lengths: Iterable[tuple[int, int]]) -> None:
    """UsageError, before any work, for a row, by its place, of more tokens than the model has room for."""
    most = room(model)
    for i, length in lengths:
        if length > most:
            raise UsageError(
                f"row {i + 1}: is too long, {length} tokens: the model has room for {most}; shorten it or leave it out"
            )


def losses(model: Any, items: Sequence[Encoded], *, options: Evaluate, step: Step | None = None) -> list[Loss]:
    """What the model makes of the tokens behind each prompt; rows of like lengths go together."""
    found: list[Loss] = [Loss(0.0, 0)] * len(items)
    order = sorted(range(len(items)), key=lambda i: len(items[i][0]))
    with torch.no_grad():
        for start in range(0, len(order), options.batch):
            part = order[start : start + options.batch]
            logits, wanted, row = answer_logits(model, [items[i] for i in part], options.device)
            each = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
            counts = row.bincount(minlength=len(part)).tolist()
            for i, own in zip(part, each.double().cpu().split(counts), strict=True):
                found[i] = Loss(float(own.sum()), len(own))
                if math.isnan(found[i].nll):
                    raise AdapterError(
                        f"row {i + 1}: the model gives no number (NaN) in {logits.dtype}; are its weights and the "
                        "adapter's finite? Choose a wider dtype, or another device"
                    )
            if step is not None:
                step(sum(len(items[i][0]) for i in part))
    return found


def exact_match(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    options: Evaluate = Evaluate(),
    step: Step | None = None,
) -> float | None:
    """The share of the rows with a prompt whose greedy answer is theirs, but for blanks around it; None without any."""
    said = [reply for reply in replies(model, tokenizer, rows, options=options, step=step) if reply is not None]
    return sum(reply.exact for reply in said) / len(said) if said else None


@dataclass(frozen=True)
class Reply:
    """A greedy answer, whether it is the row's, and the probability of all of its tokens together."""

    text: str
    exact: bool
    confidence: float


def replies(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    options: Evaluate = Evaluate(),
    step: Step | None = None,
) -> list[Reply | None]:
    """What the model answers greedily to each prompt; None for a row without one.

    Prompts of one length go together, so that there is no padding, which changes the last digits. An end token is part
    of what the model is confident of; an answer that was cut off at `max_tokens` has none.
    """
    groups: dict[int, list[tuple[int, list[int]]]] = {}
    for i, row in enumerate(rows):
        if row.prompt:
            asked = prompt_ids(tokenizer, row.prompt, chat=options.chat)
            groups.setdefault(len(asked), []).append((i, asked))
    found: list[Reply | None] = [None] * len(rows)
    ends = end_ids(model, tokenizer)
    for length, group in sorted(groups.items()):
        with torch.no_grad(), generating(model, tokenizer, asked=length, max_tokens=options.max_tokens) as how:
            for start in range(0, len(group), options.batch):
                part = group[start : start + options.batch]
                ids = torch.tensor([prompt for _, prompt in part], device=options.device)
                sure = _Confidence(len(part), ends)
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=how,
                    logits_processor=library("transformers").LogitsProcessorList([sure]),
                )
                for (i, _), tokens, total in zip(part, out[:, length:].tolist(), sure.total.tolist(), strict=True):
                    said = tokenizer.decode(tokens, skip_special_tokens=True)
                    found[i] = Reply(said, said.strip() == rows[i].answer.strip(), math.exp(total))
                if step is not None:
                    step(out.numel())
    return found


class _Confidence:
    """Adds up the log-probability of the likeliest token, step by step of a greedy answer, up to its end."""

    def __init__(self, rows: int, ends: Sequence[int]) -> None:
        self.total = torch.zeros(rows, dtype=torch.float64)
        self._going = torch.ones(rows, dtype=torch.bool)
        self._ends = torch.tensor(ends, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.float().log_softmax(-1).max(-1)
        self.total += torch.where(self._going, best.values.double().cpu(), 0.0)
        self._going &= ~torch.isin(best.indices.cpu(), self._ends)
        return scores


def n_steps(tokenizer: Any, rows: Sequence[Row], options: Evaluate) -> int:
    """How often `evaluate` calls its `step`."""
    chosen = rows[: options.max_rows]
    lengths = [
        len(prompt_ids(tokenizer, row.prompt, chat=options.chat)) for row in chosen if row.prompt and options.match
    ]
    batches = -(-len(chosen) // options.batch)
    return batches + sum(-(-lengths.count(length) // options.batch) for length in set(lengths))
