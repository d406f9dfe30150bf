"""A few steps of training after a squeeze or a rounding, which bring back much of what it took.

Of a squeezed adapter this is the continued form of LoRA-Squeeze (arXiv 2602.10993). What is in codes is trained in
them, gradients going straight through the rounding.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.errors import AdapterError, InputError, UsageError
from loratools.files import Saved, load, packed_place, save
from loratools.ops.convert import Convert, convert
from loratools.ops.quantize import Quantize, dtype_named, quantize_file, recorded_arguments
from loratools.reports.recover import RecoverReport
from loratools.storage.atomic import AtomicFile, explained, printable, refuse_existing, temporary_mark
from loratools.training.cost import Cost, Machine, if_known, n_tokens, n_weights
from loratools.training.distil import Train, TrainRow, train_rows
from loratools.training.lines import read_json, read_lines
from loratools.training.peft_model import load_adapter, save_adapter
from loratools.training.qat import Grid, Quantiser, quantization_aware, rounding
from loratools.training.training_run import digest_of_trainable, identity

_FORM = 'give rows such as {"prompt": "...", "answer": "..."} or {"text": "..."}'
_DIRECT = ("rtn", "sign", "lloyd", "nf", "petl")
_MOST_HELD_OUT = 64  # rows
_LOOKS = 5  # at the held-out rows, on the way
RATE, UNITS = 5e-4, 0.02  # learning rates: of plain numbers; of whole multiples of a unit


@dataclass(frozen=True)
class Recover:
    """How to train: `learning_rate` is 5e-4 unless given, 0.02 units on a grid; `held_out` the share of the rows, 64 at
    most, by which the best state is chosen."""

    steps: int = 50
    learning_rate: float | None = None
    batch: int = 8
    held_out: float = 0.1
    chat: bool = False
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise UsageError(f"a share of {self.held_out:g} held-out rows: give 0 or more, and less than 1")
        self.training(RATE)  # which refuses what cannot be trained with

    def training(self, rate: float) -> Train:
        """How to train, at this rate unless another is asked for."""
        return Train(
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            batch=self.batch,
            steps=self.steps,
            every=-(-self.steps // _LOOKS),
            patience=_LOOKS + 1,
            chat=self.chat,
            device=self.device,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Codes:
    """How an adapter in codes is rounded while it is trained, and packed after it."""

    quantise: Quantiser | Grid
    pack: Quantize


def read_train_rows(path: str | os.PathLike[str], limit: int | None = None) -> list[TrainRow]:
    """The first `limit` rows with a prompt and an answer, or a text alone; InputError names the line that is none."""
    return read_lines(path, limit, _row, what="rows", form=_FORM)


def recover(
    model: Any,
    tokenizer: Any,
    adapter: Adapter,
    rows: Sequence[TrainRow],
    output: str | os.PathLike[str],
    options: Recover = Recover(),
    *,
    resume: bool = False,
    force: bool = False,
    step: Callable[[int], None] | None = None,
) -> tuple[Saved, RecoverReport]:
    """Train `adapter` on the base `model` for some steps and write it: packed as it was, or else as a PEFT folder.

    The numbers have the dtype that they had. `model` is left with the adapter in it. `step` is called with the tokens
    of each step. A run that is interrupted leaves its state beside the output, from which one with `resume` goes on to
    the same result. UsageError for codes that cannot be trained in, or where such a state lies and nobody said what to
    do with it; AdapterError where the loss is no longer finite.
    """
    codes = codes_of(adapter)
    place = output_of(adapter, output, resume=resume, force=force)
    state = state_of(place)
    if not resume:
        with explained(state):
            state.unlink(missing_ok=True)
    train, held_out = _split(rows, options)
    how = options.training(UNITS if codes is not None and isinstance(codes.quantise, Grid) else RATE)
    wrapped = load_adapter(model, adapter, is_trainable=True)
    made_for = repr((identity(adapter), digest_of_trainable(wrapped), model.name_or_path))
    with nullcontext() if codes is None else quantization_aware(wrapped, codes.quantise):
        try:
            trained = train_rows(
                wrapped,
                tokenizer,
                train,
                how,
                held_out=held_out,
                checkpoint=state,
                made_for=made_for,
                step=step,
            )
        except AdapterError:  # it would come to the same again
            with explained(state):
                state.unlink(missing_ok=True)
            raise
    arguments = {
        "steps": options.steps,
        "learning_rate": how.learning_rate,
        "batch": options.batch,
        "seed": options.seed,
    }
    with tempfile.TemporaryDirectory(prefix="loratools-") as folder:
        save_adapter(wrapped, folder)
        with load(folder) as made:
            saved = _written(made, adapter, codes, place, arguments, force=force)
    with explained(state):
        state.unlink(missing_ok=True)
    looks = {look.step: look.held_out for look in trained.looks}
    before, after = (None, None) if not looks else (looks[0], looks[trained.best_step])
    return saved, RecoverReport(
        rows=len(train),
        held_out=len(held_out),
        steps=len(trained.losses),
        best_step=trained.best_step,
        tokens=trained.tokens,
        seconds=round(trained.seconds, 1),
        nll_before=None if before is None else before.nll,
        nll_after=None if after is None else after.nll,
        answers_before=None if before is None else before.answers,
        answers_after=None if after is None else after.answers,
        losses=trained.losses,
        rounding="" if codes is None else f"{codes.pack.method}",
        bytes_before=adapter.file_nbytes,
        bytes_after=saved.nbytes,
        output=str(saved.path),
        warnings=trained.warnings,
    )


def output_of(adapter: Adapter, output: str | os.PathLike[str], *, resume: bool = False, force: bool = False) -> Path:
    """Where `recover` writes: a file for what is in codes, else a folder. OutputError where something lies there, or
    nothing can be written; UsageError where an earlier run has left its state beside it."""
    place = Path(output)
    if codes_of(adapter) is None:
        refuse_existing(place, force=force)
    else:
        place = packed_place(place, force=force)
    state = state_of(place)
    if os.path.lexists(state) and not (resume or force):
        raise UsageError(
            f"{printable(state)}: is what an earlier run came to; pass --resume to go on with it, or --force to begin "
            "anew"
        )
    AtomicFile(state).abort()  # which nothing can be written to, it says now and not after the training
    return place


def state_of(place: Path) -> Path:
    """The file that a run which is not over keeps its state in."""
    if place.name in ("", ".."):
        place = Path(os.path.abspath(place))
    return place.with_name(f"{temporary_mark(place.name)}.recover.pt")


@if_known
def cost(base: str | os.PathLike[str], rows: Sequence[TrainRow], options: Recover) -> Cost:
    """What training on those rows will take; None where the base is not here."""
    weights, machine = n_weights(base), Machine(options.device)
    each = sum(n_tokens(row.prompt, row.answer) for row in rows) / max(len(rows), 1)
    tokens = options.batch * each
    looks = (_LOOKS + 1) * _n_held_out(rows, options) * each
    seconds = machine.training(weights, options.steps * tokens) + machine.reading(weights, looks)
    return Cost(machine.memory(weights, weights, round(tokens)), seconds)


def codes_of(adapter: Adapter) -> Codes | None:
    """How a packed adapter is trained in its codes; None for one of plain numbers, UsageError where there is no way."""
    if adapter.origin is None or adapter.origin.container != "packed":
        return None
    stated = recorded_arguments(adapter)
    method, fields = stated.get("method"), Quantize.__dataclass_fields__
    if method in ("grid", "exact"):
        return Codes(Grid(), Quantize("exact"))
    if method in _DIRECT:
        known = {name: stated.get(name, fields[name].default) for name in ("bits", "group", "scales", "rounds")}
        pack = Quantize(method, **known)
        return Codes(rounding(method, int(pack.bits), pack.scales, group=pack.group), pack)
    raise UsageError(
        f"the codes of {method or 'this file'} cannot be trained in; `loratools dequantize` makes plain numbers of them"
    )


def _written(
    made: Adapter, before: Adapter, codes: Codes | None, place: Path, arguments: Mapping[str, Any], *, force: bool
) -> Saved:
    if codes is not None:
        return quantize_file(made, place, codes.pack, force=force)[0]
    result, _ = convert(made, "peft", Convert(dtype=dtype_named(before.usual_dtype)))
    return save(result.recorded("recover", arguments), place, force=force)


def _split(rows: Sequence[TrainRow], options: Recover) -> tuple[list[TrainRow], list[TrainRow]]:
    """The last of each so many rows is held out."""
    held = _n_held_out(rows, options)
    if not held:
        return list(rows), []
    every = len(rows) // held
    chosen = {i * every + every - 1 for i in range(held)}
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def _n_held_out(rows: Sequence[TrainRow], options: Recover) -> int:
    return min(_MOST_HELD_OUT, int(len(rows) * options.held_out))


def _row(line: str, where: str) -> TrainRow:
    fields = read_json(line, where, _FORM)
    if isinstance(fields, Mapping):
        prompt, answer, text = (fields.get(name) for name in ("prompt", "answer", "text"))
        if isinstance(prompt, str) and isinstance(answer, str) and answer:
            return TrainRow(prompt, answer)
        if isinstance(text, str) and text:
            return TrainRow("", text)
    raise InputError(f"{where}: has neither a prompt and answer nor a text; {_FORM}")
