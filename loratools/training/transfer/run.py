"""A transfer from beginning to end, stage by stage; what is done already is not done again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loratools._version import __version__
from loratools.errors import UsageError
from loratools.files import load, locate, save
from loratools.ops.measuring import relative_error
from loratools.ops.squeeze import Squeeze, squeeze
from loratools.reports.transfer import KitReport, TransferReport
from loratools.storage.atomic import refuse_existing, write_whole
from loratools.training.applied import base_of
from loratools.training.evaluate import Evaluate, Row, evaluate
from loratools.training.seeds import order
from loratools.training.transfer.data_stages import keep_inputs, make_inputs, prepare
from loratools.training.transfer.fit import TRAINING, fit, refuse_other_vocabulary
from loratools.training.transfer.job import (
    CHECKPOINT,
    DISCRIMINATOR,
    GENERATED,
    INPUTS,
    LABELLED,
    PROBES,
    START,
    TRAINED,
    Job,
    Meter,
    in_memory,
    no_meter,
)
from loratools.training.transfer.label import label
from loratools.training.transfer.models_in_turn import ModelsInTurn, Role
from loratools.training.transfer.reporting import reported
from loratools.training.transfer.seed_inputs import Seed, read_seeds
from loratools.training.transfer.settings import Transfer
from loratools.training.transfer.stage_files import StageFiles
from loratools.training.transfer.warm_start import warm_start

RECEIPT = "transfer.json"
SEEDS = "seeds.jsonl"
KIT = "transfer_kit"  # beside an adapter's files: what --prepare-only saved


def transfer(
    adapter: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    seeds: Sequence[Seed],
    output: str | os.PathLike[str],
    options: Transfer = Transfer(),
    *,
    generator: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    rows: Sequence[Row] = (),
    resume: bool = False,
    force: bool = False,
    allow_download: bool = False,
    meter: Meter = no_meter,
) -> TransferReport:
    """Train an adapter for `target` that answers as `adapter` does on `source`, on inputs that a model makes up.

    Without `seeds`, the source with its adapter is asked to begin by itself. `rows` are evaluated by all models. Every
    stage leaves files in `work`, by default OUTPUT.transfer, and with `resume` an interrupted run goes on to the same
    result; files that were edited meanwhile are taken as they are. The output is a PEFT folder with a receipt.
    """
    out = Path(output)
    refuse_existing(out, force=force or resume)
    locate(Path(adapter))
    kit = Path(adapter) / KIT / DISCRIMINATOR
    if not seeds and kit.is_file():
        seeds = read_seeds(kit.with_name(SEEDS))
    places: dict[Role, str] = {
        "source": str(source),
        "target": str(target),
        "generator": str(generator if generator is not None else target),
    }
    models = ModelsInTurn(str(adapter), places, options.device, options.chat, allow_download)
    files = StageFiles(Path(work) if work is not None else out.with_name(f"{out.name}.transfer"))
    job = Job(models, files, options, tuple(seeds), kit if kit.is_file() and seeds else None, meter)
    refuse_other_vocabulary(job)
    files.open(resume=resume, force=force)
    _run(job, str(adapter), rows)
    report = _finished(job, str(adapter), out)
    models.drop()
    return report


def save_kit(
    adapter: str | os.PathLike[str],
    source: str | os.PathLike[str],
    seeds: Sequence[Seed],
    output: str | os.PathLike[str] | None = None,
    options: Transfer = Transfer(),
    *,
    force: bool = False,
    allow_download: bool = False,
    meter: Meter = no_meter,
) -> KitReport:
    """Save what a later transfer needs of a task's inputs: a discriminator, and a few of them as seeds.

    Beside the adapter unless `output` says where. To be done while the task's inputs are there: they can go then.
    """
    place = Path(output) if output is not None else Path(adapter) / KIT
    refuse_existing(place / DISCRIMINATOR, force=force)
    if not seeds:
        raise UsageError("a discriminator learns from real inputs: give --seeds with as many as there are")
    models = ModelsInTurn(
        str(adapter),
        {"source": str(source), "target": str(source), "generator": str(source)},
        options.device,
        options.chat,
        allow_download,
    )
    files = StageFiles(place)
    files.open(resume=True, force=force)
    few = tuple(seeds)
    with in_memory("prepare"):
        figures = prepare(Job(models, files, replace(options, passing="threshold"), few, None, meter), reads="source")
    chosen = sorted(order(len(few), options.seed)[: options.shots])
    shown = [few[i] for i in chosen]
    files.write(SEEDS, [{k: v for k, v in asdict(seed).items() if v is not None} for seed in shown])
    files.remove(PROBES, "figures.json")
    models.drop()
    return KitReport(figures["real"], figures["made_up"], figures["loss"], len(shown), str(place))


def _run(job: Job, adapter: str, rows: Sequence[Row]) -> None:
    """All stages, in turn: each is made from the settings that matter to it, and the files before it."""
    o, places = job.options, job.models.places
    made_of = {
        "seeds": [asdict(seed) for seed in job.seeds],
        "generator": places["generator"] if job.seeds else [adapter, places["source"]],
        "sampling": asdict(o.sampling),
        **{name: getattr(o, name) for name in ("shots", "show", "max_input_tokens", "batch", "seed", "chat")},
    }
    sifting = {name: getattr(o, name) for name in ("samples", "passing", "threshold", "similar", "candidates")}
    asking = {
        "teacher": [adapter, places["source"]],
        "again": o.weighing == "robust",
        **{name: getattr(o, name) for name in ("max_answer_tokens", "chat", "seed")},
    }
    training: dict[str, Any] = {"target": places["target"], "adapter": asdict(o.adapter), "train": asdict(o.training)}
    training |= {"weighing": o.weighing, "held_out": o.held_out}
    if o.training.loss != "ce":
        training["teacher"] = asking["teacher"]
    kit = str(job.kit) if job.kit is not None else None

    if o.warm_start not in (None, "activations"):  # which need no rows: first, for an error costs least here
        _start(job, adapter)
    _stage(job, "prepare", job.files.digest(settings=[made_of, o.passing == "none", kit]), prepare, PROBES)
    raw, judge = job.files.digest(settings=made_of), job.files.digest(DISCRIMINATOR)
    known = job.files.figures("generate")
    if known.get("raw", raw) != raw:
        job.files.remove(GENERATED)
    elif known.get("judge", judge) != judge:  # the same inputs, of other probabilities
        unscored = [{k: v for k, v in row.items() if k != "p"} for row in job.files.rows(GENERATED)]
        job.files.write(GENERATED, unscored)
    job.files.note_figures("generate", raw=raw, judge=judge)
    # more of the same may be wanted
    _stage(job, "generate", job.files.digest(settings=[raw, judge, sifting]), make_inputs)
    _stage(job, "filter", job.files.digest(DISCRIMINATOR, GENERATED, settings=sifting), keep_inputs)
    asked = job.files.digest(settings=asking)
    previous = job.files.figures("label").get("asked")
    job.files.note_figures("label", asked=asked)
    _stage(
        job,
        "label",
        job.files.digest(INPUTS, settings=asking),
        lambda job: label(job, reuse=previous in (None, asked)),
    )
    if o.warm_start == "activations":
        _start(job, adapter)
    start = (f"{START}/adapter_model.safetensors", f"{START}/adapter_config.json") if o.warm_start is not None else ()
    _stage(job, "train", job.files.digest(LABELLED, *start, settings=training), fit, CHECKPOINT)
    scored = {"rows": [asdict(row) for row in rows], "base": places, "adapter": adapter, "squeeze": o.squeeze_to}
    _stage(
        job,
        "evaluate",
        job.files.digest(TRAINING, f"{TRAINED}/adapter_model.safetensors", settings=scored),
        lambda job: _evaluated(job, rows),
    )


def _start(job: Job, adapter: str) -> None:
    """The stage of a warm start; of "activations" it reads the labelled rows."""
    o, places = job.options, job.models.places
    made_of = [adapter, places["source"], places["target"], o.warm_start, o.adapter.rank, o.device, o.seed]
    rows = (LABELLED,) if o.warm_start == "activations" else ()
    _stage(job, "start", job.files.digest(*rows, settings=made_of), warm_start)


def _stage(job: Job, name: str, made_from: str, work: Callable[[Job], dict[str, Any]], *own: str) -> None:
    """Do a stage unless it is done; what it left is thrown away where that was made from something else."""
    if job.files.is_done(name, made_from):
        return
    if not job.files.is_begun(name, made_from):
        job.files.remove(*own)
        job.files.note(name, made_from, done=False)
        job.files.note_figures(name, seconds=0.0, tokens=0)
    began, before = time.monotonic(), job.files.figures(name)
    with in_memory(name):
        figures = work(job)
    seconds = before.get("seconds", 0.0) + time.monotonic() - began
    tokens = before.get("tokens", 0) + figures.pop("tokens", 0)
    job.files.note_figures(name, **figures, seconds=round(seconds, 3), tokens=tokens)
    job.files.note(name, made_from, done=True)


def _evaluated(job: Job, rows: Sequence[Row]) -> dict[str, Any]:
    """Squeeze if asked to, and let every model do the rows."""
    options = job.options
    figures: dict[str, Any] = {"squeezed": None, "evaluations": {}}
    if options.squeeze_to is not None:
        model, _ = job.models.take("target")
        with load(job.files.folder / TRAINED) as trained:
            small, _ = squeeze(trained, options.squeeze_to, options=Squeeze(base=base_of(model), allow_unchanged=True))
            save(small, job.files.folder / f"{TRAINED}-squeezed", force=True)
        with load(job.files.folder / TRAINED) as trained, load(_final(job)) as small:
            figures["squeezed"] = relative_error(trained, small)
    if not rows:
        return figures
    how = Evaluate(batch=options.batch, max_tokens=options.max_answer_tokens, device=options.device, chat=options.chat)
    model, tokenizer = job.models.take("target")
    figures["evaluations"]["target"] = asdict(evaluate(model, tokenizer, rows, options=how))
    with load(_final(job)) as made:
        figures["evaluations"]["transferred"] = asdict(evaluate(model, tokenizer, rows, made, options=how))
    model, tokenizer = job.models.take("teacher")
    figures["evaluations"]["teacher"] = asdict(evaluate(model, tokenizer, rows, options=how))
    return figures


def _final(job: Job) -> Path:
    return job.files.folder / (TRAINED if job.options.squeeze_to is None else f"{TRAINED}-squeezed")


def _finished(job: Job, adapter: str, out: Path) -> TransferReport:
    """Put the output in place, and its receipt behind it."""
    with load(_final(job)) as made:
        saved = save(made, out, force=True)
        size = made.file_nbytes
    report = reported(job, adapter, str(out), size)
    receipt = {"loratools": __version__, **report.to_dict()}
    write_whole(saved.weights.parent / RECEIPT, (json.dumps(receipt, indent=1, ensure_ascii=False) + "\n").encode())
    return report
