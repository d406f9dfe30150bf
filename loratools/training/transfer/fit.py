"""The stage that trains: labelled rows, weighted, to an adapter of the target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from loratools.errors import AdapterError, UsageError
from loratools.files import load
from loratools.storage.atomic import explained, write_whole
from loratools.training.distil import Teacher, Trained, TrainRow, check_vocabularies, train_rows
from loratools.training.new_adapter import new_adapter
from loratools.training.peft_model import save_adapter
from loratools.training.prompts import require_chat
from loratools.training.seeds import order
from loratools.training.start_from import start_from
from loratools.training.transfer.confidence import confidence_weights, robust_weights
from loratools.training.transfer.job import CHECKPOINT, LABELLED, START, TRAINED, TRAINING, Job
from loratools.training.transfer.row_fields import unanswered
from loratools.training.transfer.settings import Transfer

_LEAST_HELD_OUT = 10  # rows: of fewer, none is held out


def usable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The labelled rows that say something, and came to an end."""
    return [row for row in rows if row["answer"].strip() and row.get("ended", True)]


def labelled(job: Job) -> list[dict[str, Any]]:
    """The labelled rows, as the teacher or somebody else left them."""
    return job.files.rows(LABELLED, unanswered)


def fit(job: Job) -> dict[str, Any]:
    """Train the adapter and save it in the work folder; figures of the training lie beside it."""
    options, how = job.options, job.options.training
    rows, held_out = split(weighted(labelled(job), options), options)
    if not rows:
        raise AdapterError(
            "no labelled row can be trained on: answers are empty, or did not end within --max-answer-tokens "
            f"({options.max_answer_tokens}); raise it"
        )
    teacher = None
    if how.loss != "ce":
        model, tokenizer = job.models.take("teacher")
        teacher = Teacher(model, tokenizer, options.chat)
    model, tokenizer = job.models.take("target", keep=("teacher",))
    adapted = new_adapter(model, options.adapter, seed=options.seed)
    left_out: tuple[str, ...] = ()
    if options.warm_start is not None:
        with load(job.files.folder / START) as start:
            left_out = start_from(adapted, start)
    step = job.meter(how.n_steps(len(rows)), "steps of training, at most")
    trained = train_rows(
        adapted,
        tokenizer,
        rows,
        how,
        held_out=held_out,
        teacher=teacher,
        checkpoint=job.files.folder / CHECKPOINT,
        step=step,
    )
    _save(job, trained, len(rows), len(held_out), left_out)
    job.models.drop()  # the adapter is in it
    return {"tokens": trained.tokens, "seconds_of_steps": round(trained.seconds, 3)}


def refuse_unfit_tokenizers(job: Job) -> None:
    """UsageError before any work where the loss needs one vocabulary and there are two, or a chat template lacks."""
    models = job.models
    if job.options.train.loss == "kl":
        check_vocabularies(models.tokenizer("target"), models.tokenizer("source"))
    sides: tuple[Literal["source", "target"], ...] = ("source", "target") if job.options.chat else ()
    for side in sides:
        try:
            require_chat(models.tokenizer(side))
        except UsageError as error:
            raise UsageError(f"{models.places[side]}: {error}") from None


def weighted(rows: Sequence[dict[str, Any]], options: Transfer) -> list[TrainRow]:
    """The usable rows with their weights; a row that states none was written by hand, and is trusted."""
    some = usable(rows)
    sure = [float(row.get("confidence", 1.0)) for row in some]
    if options.weighing == "robust":
        weights = robust_weights(sure, [float(row.get("disagreement", 0.0)) for row in some])
    elif options.weighing == "confidence":
        weights = confidence_weights(sure)
    else:
        weights = [1.0] * len(some)
    return [TrainRow(row["prompt"], row["answer"], w) for row, w in zip(some, weights, strict=True)]


def split(rows: Sequence[TrainRow], options: Transfer) -> tuple[list[TrainRow], list[TrainRow]]:
    """Rows to train on, and the share that is held out; none of few."""
    n = round(options.held_out * len(rows))
    if len(rows) < _LEAST_HELD_OUT or not n:
        return list(rows), []
    out = set(order(len(rows), options.seed)[: min(n, len(rows) - 1)])
    return [row for i, row in enumerate(rows) if i not in out], [row for i, row in enumerate(rows) if i in out]


def _save(job: Job, trained: Trained, rows: int, held_out: int, left_out: tuple[str, ...]) -> None:
    place = job.files.folder / TRAINED
    with explained(place):
        if place.exists():
            shutil.rmtree(place)
        trained.model.peft_config[trained.model.active_adapter].base_model_name_or_path = job.models.places["target"]
        save_adapter(trained.model, place)
    warnings = list(trained.warnings)
    if left_out:
        warnings.append(f"{len(left_out)} targets of the warm start are none of the new adapter; first: {left_out[0]}")
    figures = {
        "rows": rows,
        "held_out": held_out,
        "steps": len(trained.losses),
        "best_step": trained.best_step,
        "stopped_early": trained.stopped_early,
        "tokens": trained.tokens,
        "losses": list(trained.losses),
        "looks": [{"step": look.step, **asdict(look.held_out)} for look in trained.looks],
        "warnings": warnings,
    }
    write_whole(job.files.folder / TRAINING, (json.dumps(figures) + "\n").encode())
