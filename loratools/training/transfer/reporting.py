"""The report of a transfer, out of what its stages noted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loratools.configs import read_config
from loratools.files import load
from loratools.reports.evaluate import Evaluation
from loratools.reports.transfer import (
    Agreed,
    Distillation,
    Diversity,
    Labelling,
    Moved,
    Sample,
    StageTime,
    Synthesis,
    TransferReport,
    WarmStart,
)
from loratools.training.transfer.fit import labelled, usable
from loratools.training.transfer.job import STAGES, TRAINING, Job

_SAMPLES = 10


def reported(job: Job, adapter: str, out: str, size: int) -> TransferReport:
    """What the stages left behind, as one record."""
    options, files = job.options, job.files
    every = {stage: files.figures(stage) for stage in STAGES}
    training: Mapping[str, Any] = read_config(files.folder / TRAINING)
    rows = labelled(job)
    looks = tuple(Agreed(x["step"], x["answers"], x["tokens"], x["nll"]) for x in training["looks"])
    best = next((look for look in looks if look.step == training["best_step"]), None)
    synthesis = _synthesis(job, every)
    used = usable(rows)
    sure = [row["confidence"] for row in used if "confidence" in row]
    labelling = Labelling(
        len(used),
        sum(not row["answer"].strip() for row in rows),
        sum(bool(row["answer"].strip()) and not row.get("ended", True) for row in rows),
        sum(sure) / len(sure) if sure else 1.0,
    )
    start = None if options.warm_start is None else _warm_start(options.warm_start, every["start"])
    evaluations = {name: Evaluation(**one) for name, one in every["evaluate"].get("evaluations", {}).items()}
    return TransferReport(
        adapter,
        job.models.places["source"],
        job.models.places["target"],
        job.models.places["generator"] if job.seeds else job.models.places["source"],
        options.adapter.method,
        options.squeeze_to or options.adapter.rank,
        synthesis,
        labelling,
        Distillation(
            training["rows"],
            training["held_out"],
            training["steps"],
            training["best_step"],
            training["stopped_early"],
            training["tokens"],
            tuple(training["losses"]),
            looks,
        ),
        None if best is None else best.answers,
        looks[0].answers if looks else None,
        evaluations,
        every["evaluate"].get("squeezed"),
        tuple(
            StageTime(stage, every[stage].get("seconds", 0.0), every[stage].get("tokens") or None)
            for stage in STAGES
            if stage != "start" or options.warm_start is not None
        ),
        tuple(Sample(row["prompt"], row["answer"], row.get("confidence")) for row in used[:_SAMPLES]),
        asdict(options),
        str(files.folder),
        out,
        size,
        _moved(adapter, job.models.places["source"], job.models.places["target"]),
        (*_warnings(job, synthesis, labelling), *training["warnings"]),
        start,
    )


def _warm_start(align: str, figures: Mapping[str, Any]) -> WarmStart:
    return WarmStart(align, figures["targets"], figures["dropped"], figures["squeezed"])


def _synthesis(job: Job, every: Mapping[str, Mapping[str, Any]]) -> Synthesis:
    sifted, prepared = every["filter"], every["prepare"]
    n = sifted["generated"]
    return Synthesis(
        inputs="few-shot" if job.seeds else "self-prompted",
        seeds=len(job.seeds),
        generated=n,
        kept=sifted["kept"],
        empty=sifted["empty"],
        unfinished=sifted["unfinished"],
        duplicate=sifted["duplicate"],
        similar=sifted.get("similar", 0),
        improbable=sifted["improbable"],
        acceptance=sifted["kept"] / n,
        distinct_1=sifted["distinct_1"],
        distinct_2=sifted["distinct_2"],
        distinct_3=sifted["distinct_3"],
        discrepancy=sifted["discrepancy"],
        discriminator=prepared["discriminator"],
        discriminator_loss=prepared.get("loss"),
        least=sifted.get("least"),
        diversity={
            name: Diversity(**{**one, "characters": tuple(one["characters"]), "words": tuple(one["words"])})
            for name, one in sifted.get("diversity", {}).items()
        },
    )


def _moved(adapter: str, source: str, target: str) -> Moved:
    with load(adapter) as old:
        families = sorted({entry.family.family for entry in old.entries.values()})
        ranks = sorted({entry.rank for entry in old.entries.values()})
    return Moved(tuple(families), tuple(ranks), _type_of(source), _type_of(target))


def _type_of(place: str) -> str | None:
    """The kind of model that a folder's config names."""
    config = Path(place) / "config.json"
    found = read_config(config).get("model_type") if config.is_file() else None
    return found if isinstance(found, str) else None


def _warnings(job: Job, synthesis: Synthesis, labelling: Labelling) -> tuple[str, ...]:
    found = []
    if not job.seeds:
        found.append(
            "no seeds: the inputs are what the source with its adapter says by itself, and nothing tells whether they "
            "are like the task's"
        )
    if synthesis.kept < job.options.samples:
        found.append(
            f"only {synthesis.kept} of {job.options.samples} inputs were kept out of {synthesis.generated}; see "
            f"rejected.jsonl in {job.files.folder}"
        )
    if labelling.empty:
        found.append(f"{labelling.empty} answers were empty and were left out")
    if labelling.unfinished:
        found.append(
            f"{labelling.unfinished} answers did not end within {job.options.max_answer_tokens} tokens and were left "
            "out; raise --max-answer-tokens"
        )
    if job.options.warm_start is not None:
        found += job.files.figures("start")["warnings"]
    return tuple(found)
