"""A transfer from beginning to end, stage by stage; what is done already is not done again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools._version import __version__
from loratools.errors import InputError, UsageError
from loratools.files import load, save
from loratools.ops.measuring import relative_error
from loratools.ops.squeeze import Squeeze, squeeze
from loratools.reports.transfer import KitReport, TransferReport
from loratools.storage.atomic import printable, refuse_existing, write_whole
from loratools.training.applied import base_of
from loratools.training.distil import settled
from loratools.training.evaluate import Evaluate, Row, evaluate, n_steps
from loratools.training.seeds import order
from loratools.training.training_run import identity
from loratools.training.transfer.data_stages import keep_inputs, make_inputs, prepare
from loratools.training.transfer.fit import fit, refuse_unfit_tokenizers
from loratools.training.transfer.job import (
    CHECKPOINT,
    DISCRIMINATOR,
    EVERY,
    GENERATED,
    INPUTS,
    LABELLED,
    PROBES,
    START,
    TRAINED,
    TRAINING,
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
from loratools.training.transfer.stage_files import FIGURES, RECORD, StageFiles
from loratools.training.transfer.warm_start import warm_start

if TYPE_CHECKING:
    from loratools.adapter import Adapter

RECEIPT = "transfer.json"
SEEDS = "seeds.jsonl"
KIT = "transfer_kit"
_WRITTEN = "written"  # a name among the figures of the stages


def transfer(
    adapter: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    seeds: Sequence[Seed],
    output: str | os.PathLike[str],
    options: Transfer = Transfer(),
    *,
    generator: str | os.PathLike[str] | None = None,
    kit: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    rows: Sequence[Row] = (),
    resume: bool = False,
    force: bool = False,
    allow_download: bool = False,
    meter: Meter = no_meter,
) -> TransferReport:
    """Train an adapter for `target` that answers as `adapter` does on `source`, on inputs that a model makes up.

    What `save_kit` saved with the adapter, or in the folder `kit`, is used. Without `seeds`, its seeds are; where there
    is none, the source with its adapter is asked to begin by itself, and no `generator` is. `rows` are evaluated by all
    models. Every stage leaves files in `work`, by default OUTPUT.transfer, and with `resume` an interrupted run goes on
    to the same result; files that were edited meanwhile are taken as they are. The output is a PEFT folder with a
    receipt.
    """
    out, files = refuse_taken(output, work, resume=resume, force=force)
    with load(adapter) as opened:
        known = identity(opened)
    judge = judge_of(adapter, kit)
    if not seeds and judge is not None:
        seeds = read_seeds(judge.with_name(SEEDS))
    if generator is not None and not seeds:
        raise UsageError("without seeds the source makes up inputs itself; give some, or leave the generator out")
    places: dict[Role, str] = {
        "source": str(source),
        "target": str(target),
        "generator": str(generator if generator is not None else target),
    }
    models = ModelsInTurn(str(adapter), places, options.device, allow_download)
    how = settled(options.train, models.tokenizer("target"), models.tokenizer("source"))
    options = replace(options, train=how)
    job = Job(models, files, options, tuple(seeds), judge if seeds else None, meter)
    refuse_unfit_tokenizers(job)
    with files.open(EVERY, resume=resume, force=force):
        _run(job, known, rows)
        report = _finished(job, str(adapter), out)
    models.drop()
    return report


def refuse_taken(
    output: str | os.PathLike[str],
    work: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    force: bool = False,
) -> tuple[Path, StageFiles]:
    """Where a transfer writes, and its work folder; OutputError where something lies there. What the same work folder
    has led to is replaced by a run that goes on."""
    out = Path(os.path.abspath(output)) if Path(output).name in ("", "..") else Path(output)
    files = StageFiles(Path(work) if work is not None else out.with_name(f"{out.name}.transfer"))
    refuse_existing(out, force=force or (resume and files.has_begun and _came_from(files, out)))
    return out, files


def _came_from(files: StageFiles, out: Path) -> bool:
    """Whether what lies at `out` was written from this work folder, wherever both have been moved to since."""
    if files.figures(_WRITTEN).get("place") == str(out.resolve()):
        return True
    try:
        receipt = json.loads((out / RECEIPT).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    work = receipt.get("work") if isinstance(receipt, dict) else None
    return isinstance(work, str) and Path(work).name == files.folder.resolve().name


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

    As `kit_of` has it unless `output` says where. To be done while the task's inputs are there: they can go then.
    """
    place = Path(output) if output is not None else kit_of(adapter)
    refuse_existing(place / DISCRIMINATOR, force=force)
    if not seeds:
        raise UsageError("a discriminator learns from real inputs: give --seeds with as many as there are")
    load(adapter).close()  # which refuses what is none
    models = ModelsInTurn(
        str(adapter),
        {"source": str(source), "target": str(source), "generator": str(source)},
        options.device,
        allow_download,
    )
    files = StageFiles(place)
    job = Job(models, files, replace(options, passing="threshold"), tuple(seeds), None, meter)
    shown = [seeds[i] for i in sorted(order(len(seeds), options.seed)[: options.shots])]
    with files.open(resume=True):
        # first, as the discriminator tells that all is there
        files.write(SEEDS, [{k: v for k, v in asdict(seed).items() if v is not None} for seed in shown])
        made_from = files.digest(settings=[_made_of(job, models.places["source"]), options.batch])
        _stage(job, "prepare", made_from, lambda job: prepare(job, reads="source"), PROBES)
        figures = files.figures("prepare")
        files.remove(PROBES, FIGURES, RECORD)
    models.drop()
    return KitReport(figures["real"], figures["made_up"], figures["loss"], len(shown), str(place))


def kit_of(adapter: str | os.PathLike[str]) -> Path:
    """Where what `save_kit` saves lies: in the folder of an adapter, or next to its only file."""
    place = Path(adapter)
    return place.with_name(f"{place.name}.{KIT}") if place.is_file() else place / KIT


def judge_of(adapter: str | os.PathLike[str], kit: str | os.PathLike[str] | None = None) -> Path | None:
    """The discriminator that was made with an adapter, in `kit` or where `kit_of` has it; InputError where `kit` holds
    none."""
    judge = (kit_of(adapter) if kit is None else Path(kit)) / DISCRIMINATOR
    if judge.is_file():
        return judge
    if kit is None:
        return None
    raise InputError(f"{printable(judge.parent)}: holds no {DISCRIMINATOR}; make one with --prepare-only")


def _made_of(job: Job, generator: Any) -> dict[str, Any]:
    """What inputs are made of. How many at once does not belong to it: with less memory, what was made is kept."""
    o = job.options
    return {
        "seeds": [asdict(seed) for seed in job.seeds],
        "generator": generator,
        "sampling": asdict(o.sampling),
        **{name: getattr(o, name) for name in ("shots", "show", "max_input_tokens", "seed", "chat")},
    }


def _run(job: Job, known: list[Any], rows: Sequence[Row]) -> None:
    """All stages, in turn: each is made from the settings that matter to it, and the files before it."""
    o, places = job.options, job.models.places
    made_of = _made_of(job, places["generator"] if job.seeds else [known, places["source"]])
    sifting = {name: getattr(o, name) for name in ("samples", "passing", "threshold", "similar", "candidates")}
    asking = {
        "teacher": [known, places["source"]],
        "again": o.weighing == "robust",
        **{name: getattr(o, name) for name in ("max_answer_tokens", "chat", "seed")},
    }
    training: dict[str, Any] = {"target": places["target"], "adapter": asdict(o.adapter), "train": asdict(o.training)}
    training |= {"weighing": o.weighing, "held_out": o.held_out}
    if o.training.loss != "ce":
        training["teacher"] = asking["teacher"]
    kit = None if job.kit is None else job.kit.read_text("utf-8", "replace")

    if o.warm_start not in (None, "activations"):  # which need no rows: first, for an error costs least here
        _start(job, known)
    _stage(job, "prepare", job.files.digest(settings=[made_of, o.passing == "none", kit]), prepare, PROBES)
    raw, judge = job.files.digest(settings=made_of), job.files.digest(DISCRIMINATOR)
    before = job.files.figures("generate")
    if before.get("raw", raw) != raw:
        job.files.remove(GENERATED)
    elif before.get("judge", judge) != judge:  # the same inputs, of other probabilities
        unscored = [{k: v for k, v in row.items() if k != "p"} for row in job.files.rows(GENERATED)]
        job.files.write(GENERATED, unscored)
    job.files.note_figures("generate", raw=raw, judge=judge)
    # more of the same may be wanted
    _stage(job, "generate", job.files.digest(settings=[raw, judge, sifting]), make_inputs)
    _stage(job, "filter", job.files.digest(DISCRIMINATOR, GENERATED, settings=sifting), keep_inputs)
    asked = job.files.digest(settings=asking)
    if job.files.figures("label").get("asked", asked) != asked:
        job.files.remove(LABELLED)
    job.files.note_figures("label", asked=asked)
    _stage(job, "label", job.files.digest(INPUTS, settings=asking), label)
    if o.warm_start == "activations":
        _start(job, known)
    start = _adapter_files(START) if o.warm_start is not None else ()
    _stage(job, "train", job.files.digest(LABELLED, *start, settings=training), fit, CHECKPOINT)
    scored = {"rows": [asdict(row) for row in rows], "base": places, "squeeze": o.squeeze_to, "asking": asking}
    _stage(
        job,
        "evaluate",
        job.files.digest(TRAINING, *_adapter_files(TRAINED), settings=scored),
        lambda job: _evaluated(job, rows),
    )


def _adapter_files(folder: str) -> tuple[str, str]:
    return f"{folder}/adapter_model.safetensors", f"{folder}/adapter_config.json"


def _start(job: Job, known: list[Any]) -> None:
    """The stage of a warm start; of "activations" it reads the labelled rows."""
    o, places = job.options, job.models.places
    made_of = [known, places["source"], places["target"], o.warm_start, o.adapter.rank, o.device, o.seed]
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

    def scored(role: Role, adapter: Adapter | None = None) -> dict[str, Any]:
        model, tokenizer = job.models.take(role)
        step = job.meter(n_steps(tokenizer, rows, how), f"batches of --eval by the {'new one' if adapter else role}")
        return asdict(evaluate(model, tokenizer, rows, adapter, options=how, step=step))

    figures["evaluations"]["target"] = scored("target")
    with load(_final(job)) as made:
        figures["evaluations"]["transferred"] = scored("target", made)
    figures["evaluations"]["teacher"] = scored("teacher")
    return figures


def _final(job: Job) -> Path:
    return job.files.folder / (TRAINED if job.options.squeeze_to is None else f"{TRAINED}-squeezed")


def _finished(job: Job, adapter: str, out: Path) -> TransferReport:
    """Put the output in place, and its receipt behind it."""
    job.files.note_figures(_WRITTEN, place=str(out.resolve()))  # first: a run may be killed before the receipt
    with load(_final(job)) as made:
        saved = save(made, out, force=True)
        size = made.file_nbytes
    report = reported(job, adapter, str(out), size)
    receipt = {"loratools": __version__, **report.to_dict()}
    write_whole(saved.weights.parent / RECEIPT, (json.dumps(receipt, indent=1, ensure_ascii=False) + "\n").encode())
    return report
