"""Training an adapter on rows of text, with a teacher's words, its probabilities or both, until it agrees no better.

`train_rows` is the one training loop here: rows may carry weights, held-out rows decide when it stops and which state
is kept, and a checkpoint lets a run that was killed go on to the very same result.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loratools._lazy import torch
from loratools.errors import UsageError
from loratools.storage.atomic import printable
from loratools.training.agreement import Agreement, agreement_of, answer_logits
from loratools.training.losses import cross_entropy, divergence, shared_starts, sorted_distance, token_starts
from loratools.training.models import room
from loratools.training.prompts import Encoded, encoded
from loratools.training.seeds import batch_of, seeded
from loratools.training.training_run import Look, TrainingRun

if TYPE_CHECKING:
    from torch import Tensor

LossKind = Literal["auto", "ce", "kl", "uld"]
_EVERY = 10  # steps between two looks at the held-out rows, at most, unless stated


@dataclass(frozen=True)
class TrainRow:
    """A prompt, the answer that is to follow it, and how much the row counts."""

    prompt: str
    answer: str
    weight: float = 1.0


@dataclass(frozen=True)
class Train:
    """How to train.

    `loss`: "ce" of the answers' tokens, which any two tokenizers allow; "kl" adds the divergence from the teacher's
    softened probabilities, of one vocabulary; "uld" adds the distance of sorted probabilities where tokens of both
    tokenizers begin at the same character; "auto" is "kl" of a teacher whose tokenizer is the student's, else "ce".
    `hard` is the share of the cross-entropy where there are two. `steps`, or else `epochs`. With held-out rows,
    training stops after `patience` looks that found no better agreement, `every` steps apart, and the best state is
    kept. `chat` puts prompts into the tokenizer's chat template.
    """

    loss: LossKind = "auto"
    temperature: float = 2.0
    hard: float = 0.5
    learning_rate: float = 5e-4
    batch: int = 8
    epochs: int = 3
    steps: int | None = None
    every: int | None = None
    patience: int = 4
    max_tokens: int = 1024
    chat: bool = False
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "steps", "every", "patience", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.hard <= 1:
            raise UsageError(f"the share of the cross-entropy must be from 0 to 1, not {self.hard:g}")
        if not (self.temperature > 0 and self.learning_rate > 0):
            raise UsageError("the temperature and the learning rate must be more than 0")

    def n_steps(self, rows: int) -> int:
        """How many steps there are for so many rows, unless they end early."""
        return self.steps if self.steps is not None else self.epochs * -(-rows // self.batch)


@dataclass(frozen=True, eq=False)
class Teacher:
    """The model whose probabilities count, with its adapter in it; `chat` as its answers were asked for."""

    model: Any
    tokenizer: Any
    chat: bool = False


@dataclass(frozen=True, eq=False)
class Trained:
    """The model, a PeftModel in its best state, and how it came to it.

    `losses` are of single steps, `looks` at the held-out rows; `best_step` is the one whose state was kept.
    """

    model: Any
    losses: tuple[float, ...]
    looks: tuple[Look, ...]
    best_step: int
    tokens: int
    seconds: float
    stopped_early: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Item:
    """A row as the student reads it, and as the teacher does where it is asked."""

    ids: Encoded
    weight: float
    taught: Encoded | None
    shared: tuple[tuple[int, int], ...] = ()  # for "uld": tokens of both that begin at the same character


def train_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TrainRow],
    options: Train = Train(),
    *,
    held_out: Sequence[TrainRow] = (),
    teacher: Teacher | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    made_for: str = "",
    step: Callable[[int], None] | None = None,
    forward: Callable[[Any, int], None] | None = None,
) -> Trained:
    """Train what is trainable in `model`, a PeftModel, on `rows`, and leave it in its best state.

    The same for the same rows, options and seed, on one machine; also where it was killed and goes on from
    `checkpoint`, a file written at every look, if that was `made_for` the same. AdamW without decay, gradients cut to
    norm 1, a short warm-up and a cosine to zero. Rows that the model has no room for are left out, with a warning.
    `step` is called with the tokens of each step; `forward(model, step)` before each, to set what should differ between
    steps. AdapterError where a loss is no longer finite; UsageError where there are no rows to train on, or
    `options.loss` needs a teacher of the same vocabulary and there is none.
    """
    options = settled(options, tokenizer, None if teacher is None else teacher.tokenizer)
    asked = None if options.loss == "ce" else teacher
    _check_teacher(asked, tokenizer, options)
    most = min(options.max_tokens, room(model))
    items, left_out = _items(tokenizer, rows, options, asked, most)
    if not items:
        raise UsageError(f"there are no rows of at most {most} tokens, and at least 2, to train on; give some")
    others, not_looked_at = _items(tokenizer, held_out, options, None, most)
    looked_at = [item.ids for item in others]
    warnings = [
        f"{n} {kind} {why} and were left out"
        for kind, reasons in (("rows", left_out), ("held-out rows", not_looked_at))
        for why, n in reasons.items()
    ]
    run = TrainingRun(model, options.n_steps(len(items)), options.learning_rate)
    place = None if checkpoint is None else Path(checkpoint)
    state_of = _digest(rows, held_out, options, made_for)
    if place is not None and not run.load(place, state_of) and os.path.lexists(place):
        warnings.append(f"{printable(place)}: was damaged, or of another run; this one began anew")
    every = options.every or max(1, min(_EVERY, run.steps // 8))
    was_training, began = model.training, time.monotonic()
    try:
        if looked_at and not run.looks:
            run.look(agreement_of(model, looked_at, batch=options.batch, device=options.device))
        while not run.is_over(options.patience):
            batch = [items[i] for i in batch_of(len(items), options.batch, run.step, options.seed)]
            with seeded(options.seed, "step", run.step):  # what drops out does not depend on where a run began
                model.train()
                if forward is not None:
                    forward(model, run.step)
                run.descend(_loss(model, batch, options, asked))
            tokens = sum(len(item.ids[0]) for item in batch)
            run.tokens += tokens
            if step is not None:
                step(tokens)
            if run.step % every == 0 or run.step == run.steps:
                if looked_at:
                    run.look(agreement_of(model, looked_at, batch=options.batch, device=options.device))
                run.seconds, began = run.seconds + time.monotonic() - began, time.monotonic()
                if place is not None:
                    run.save(place, state_of)
        run.restore_best()
    finally:
        model.train(was_training)
    early, told = run.step < run.steps, tuple(warnings)
    return Trained(model, tuple(run.losses), tuple(run.looks), run.best_step, run.tokens, run.seconds, early, told)


def agreement(model: Any, tokenizer: Any, rows: Sequence[TrainRow], options: Train = Train()) -> Agreement:
    """How far `model`, told every answer of `rows` up to a token, would go on as the answer does."""
    most = min(options.max_tokens, room(model))
    items, _ = _items(tokenizer, rows, options, None, most)
    if not items:
        raise UsageError(f"there are no rows of at most {most} tokens, and at least 2, to compare with; give some")
    return agreement_of(model, [item.ids for item in items], batch=options.batch, device=options.device)


def settled(options: Train, student: Any, teacher: Any | None) -> Train:
    """The options with "auto" settled, for the tokenizers of two models: "kl" where these write answers alike."""
    if options.loss != "auto":
        return options
    alike = (
        teacher is not None
        and student.get_vocab() == teacher.get_vocab()
        and student.eos_token_id == teacher.eos_token_id
    )
    return replace(options, loss="kl" if alike else "ce")


def check_vocabularies(student: Any, teacher: Any) -> None:
    """UsageError where two tokenizers have different vocabularies, so that probabilities cannot be compared."""
    if student.get_vocab() != teacher.get_vocab():
        raise UsageError(
            f"the vocabularies differ ({len(teacher.get_vocab())} and {len(student.get_vocab())} tokens): a divergence "
            "needs one vocabulary; use the loss ce, or uld"
        )


def _check_teacher(teacher: Teacher | None, tokenizer: Any, options: Train) -> None:
    if options.loss == "ce":
        return
    if teacher is None:
        raise UsageError(f"the loss {options.loss} compares with a teacher's probabilities: pass teacher=")
    if options.loss == "kl":
        check_vocabularies(tokenizer, teacher.tokenizer)


def _items(
    tokenizer: Any, rows: Sequence[TrainRow], options: Train, teacher: Teacher | None, most: int
) -> tuple[list[_Item], Counter[str]]:
    """Rows that count, of at most so many tokens, to the teacher as it has room; and why others were left out."""
    found, left_out = [], Counter[str]()
    taught_at_most = 0 if teacher is None else min(options.max_tokens, room(teacher.model))
    for row in rows:
        if not row.weight > 0:
            continue
        ids = encoded(tokenizer, row.prompt, row.answer, chat=options.chat)
        taught = None
        if teacher is not None:
            taught = encoded(teacher.tokenizer, row.prompt, row.answer, chat=teacher.chat)
        if ids[1] >= len(ids[0]):
            left_out["have no token that could be foretold"] += 1
            continue
        if len(ids[0]) > most:
            left_out[f"are longer than {most} tokens"] += 1
            continue
        if taught is not None and len(taught[0]) > taught_at_most:
            left_out[f"are longer than {taught_at_most} tokens to the teacher"] += 1
            continue
        shared = []
        if teacher is not None and taught is not None and options.loss == "uld":
            starts, others = (
                token_starts(one, every[first:], row.answer)[: len(every) - first]
                for one, (every, first) in ((tokenizer, ids), (teacher.tokenizer, taught))
            )
            shared = shared_starts(starts, others)
        found.append(_Item(ids, row.weight, taught, tuple(shared)))
    return found, left_out


def _loss(model: Any, batch: Sequence[_Item], options: Train, teacher: Teacher | None) -> Tensor:
    logits, wanted, row = answer_logits(model, [item.ids for item in batch], options.device)
    weights = torch.tensor([item.weight for item in batch], device=logits.device)[row]
    hard = cross_entropy(logits, wanted, weights)
    if teacher is None:
        return hard
    taught = [item.taught for item in batch if item.taught is not None]
    with torch.no_grad():
        meant, told, of_row = answer_logits(teacher.model, taught, options.device)
    if options.loss == "kl":
        if not torch.equal(told, wanted):
            raise UsageError("the two tokenizers end answers differently: use the loss ce, or uld")
        words = min(logits.shape[-1], meant.shape[-1])  # some models have room for more words than the tokenizer has
        soft = divergence(logits[:, :words], meant[:, :words], weights, options.temperature)
    else:
        mine, theirs = _aligned(batch, row, of_row)
        if not mine:
            return hard
        soft = sorted_distance(logits[mine], meant[theirs], weights[mine])
    return options.hard * hard + (1 - options.hard) * soft


def _aligned(batch: Sequence[_Item], row: Tensor, of_row: Tensor) -> tuple[list[int], list[int]]:
    """Positions among all answer tokens of a batch, of the student's and the teacher's, where the same text goes on."""
    mine, theirs = [], []
    for i, item in enumerate(batch):
        base, other = int((row < i).sum()), int((of_row < i).sum())
        mine += [base + a for a, _ in item.shared]
        theirs += [other + b for _, b in item.shared]
    return mine, theirs


def _digest(rows: Sequence[TrainRow], held_out: Sequence[TrainRow], options: Train, made_for: str) -> str:
    """What tells one run from another."""
    told = repr(([asdict(row) for row in rows], [asdict(row) for row in held_out], asdict(options), made_for))
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()
