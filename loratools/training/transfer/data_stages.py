"""The stages before training: what tells real inputs from made-up ones, the inputs themselves, and which are kept."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.training.seeds import order
from loratools.training.transfer.discriminator import (
    Discriminator,
    features_of,
    fit_discriminator,
    read_discriminator,
)
from loratools.training.transfer.diversity import diversity
from loratools.training.transfer.duplicates import distinct
from loratools.training.transfer.generate import generate
from loratools.training.transfer.job import DISCRIMINATOR, GENERATED, INPUTS, PROBES, REJECTED, Job
from loratools.training.transfer.likeness import mean_discrepancy
from loratools.training.transfer.models_in_turn import Role
from loratools.training.transfer.prompt_frame import PromptFrame
from loratools.training.transfer.row_fields import unfit
from loratools.training.transfer.sieve import REASONS, Sieve

if TYPE_CHECKING:
    from torch import Tensor

_PROBES: Final = (32, 256)  # made-up inputs to learn from: the least, and the most
_LIKENESS: Final = 256  # inputs of a kind to compare


def prepare(job: Job, reads: Role = "generator") -> dict[str, Any]:
    """A discriminator in the work folder: the kit's, or one of the seeds against first generations; or none."""
    options, tokens = job.options, 0
    if job.kit is not None:
        found = read_discriminator(job.kit)
    elif options.passing == "none" or not job.seeds:
        job.files.remove(DISCRIMINATOR)
        return {"discriminator": "none"}
    else:
        n = min(max(_PROBES[0], len(job.seeds)), _PROBES[1])
        step = job.meter(-(-n // options.batch), "batches to learn from")
        tokens = generate(job, PROBES, "probe", score=lambda batch: None, enough=lambda rows: len(rows) >= n, step=step)
        probes = [row["prompt"] for row in job.files.rows(PROBES) if not row.get("flaw")]
        if not probes:
            raise AdapterError(
                f"none of the first {n} generated inputs is whole; raise --max-input-tokens, or choose another "
                "--generator"
            )
        real = [seed.prompt for seed in job.seeds]
        real_features, made_up = _features(job, reads, real), _features(job, reads, probes)
        side = "source" if reads == "source" else "generator"
        found = fit_discriminator(real_features, made_up, reads=side, seed=options.seed)
        found = replace(found, frame=job.frame)
    found.save(job.files.folder / DISCRIMINATOR)
    return {
        "discriminator": "kit" if job.kit is not None else "made here",
        "loss": found.loss,
        "real": found.real,
        "made_up": found.made_up,
        "tokens": tokens,
    }


def make_inputs(job: Job) -> dict[str, Any]:
    """Generate until enough inputs would be kept, or the most were made; each row gets its probability."""
    options = job.options
    discriminator = _discriminator(job)
    job.files.write(GENERATED, _score_new(job, discriminator))
    sieve, seen = _sieve(job, discriminator), 0
    most = options.candidates * options.samples

    step = job.meter(options.samples, "inputs")
    spent = 0

    def enough(rows: list[dict[str, Any]]) -> bool:
        nonlocal seen, spent
        for row in rows[seen:]:
            if not sieve.reason(row) and sieve.counts["kept"] <= options.samples:
                step(spent)
                spent = 0
        seen = len(rows)
        return sieve.counts["kept"] >= options.samples or seen >= most

    def taken(tokens: int) -> None:
        nonlocal spent
        spent += tokens

    tokens = generate(
        job,
        GENERATED,
        "generate",
        score=lambda batch: _score(job, discriminator, batch),
        enough=enough,
        step=taken,
    )
    return {"tokens": tokens}


def keep_inputs(job: Job) -> dict[str, Any]:
    """Split what was generated into inputs and rejected rows; rows that somebody added are scored first."""
    options, frame = job.options, job.frame
    discriminator = _discriminator(job)
    rows = _score_new(job, discriminator)
    sieve = _sieve(job, discriminator)
    kept: list[dict[str, Any]] = []
    rejected = []
    for row in rows:
        if len(kept) == options.samples:
            break
        if reason := sieve.reason(row):
            rejected.append({**row, "reason": reason})
        else:
            kept.append({key: row[key] for key in ("id", "prompt", "p") if key in row})
    if not kept:
        counts = ", ".join(f"{sieve.counts[reason]} {reason}" for reason in REASONS if sieve.counts[reason])
        raise AdapterError(
            f"none of {len(rows)} generated inputs is kept ({counts}); choose a lower --threshold, another --generator "
            "or more seeds"
        )
    job.files.write(INPUTS, kept)
    job.files.write(REJECTED, rejected)
    insides = [frame.inside(row["prompt"]) for row in kept]
    whole = [frame.inside(row["prompt"]) for row in [*kept, *rejected] if not row.get("flaw")]
    shown = [frame.inside(seed.prompt) for seed in job.seeds]
    several = {"seeds": shown, "generated": whole, "kept": insides}
    return {
        "generated": len(kept) + len(rejected),
        "kept": len(kept),
        **{reason: sieve.counts[reason] for reason in REASONS},
        **{f"distinct_{n}": distinct(insides, n) for n in (1, 2, 3)},
        "discrepancy": _discrepancy(job, [row["prompt"] for row in kept]),
        "least": None if discriminator is None or options.passing != "threshold" else sieve.least,
        "diversity": {name: asdict(diversity(texts, len(shown))) for name, texts in several.items() if texts},
    }


def _sieve(job: Job, discriminator: Discriminator | None) -> Sieve:
    floor = 1.0 if discriminator is None else discriminator.floor
    return Sieve(job.options, job.frame, [seed.prompt for seed in job.seeds], floor)


def _discriminator(job: Job) -> Discriminator | None:
    path = job.files.folder / DISCRIMINATOR
    return read_discriminator(path) if path.is_file() else None


def _features(job: Job, role: Role, prompts: list[str], frame: PromptFrame | None = None) -> Tensor:
    model, tokenizer = job.models.take(role, keep=("generator", "source"))
    return features_of(
        model, tokenizer, prompts, frame or job.frame, batch=job.options.batch, device=job.options.device
    )


def _score(job: Job, discriminator: Discriminator | None, batch: list[dict[str, Any]]) -> None:
    """Note the probability that each row is a real input, but for those that are none at all."""
    whole = [row for row in batch if not row.get("flaw")]
    if discriminator is None or not whole:
        return
    role: Role = "source" if discriminator.reads == "source" else "generator"
    features = _features(job, role, [row["prompt"] for row in whole], discriminator.frame)
    for row, p in zip(whole, discriminator.probabilities(features), strict=True):
        row["p"] = round(p, 6)


def _score_new(job: Job, discriminator: Discriminator | None) -> list[dict[str, Any]]:
    """All generated rows: those without a probability get theirs, batch by batch as when they were made."""
    rows, size = job.files.rows(GENERATED, unfit), job.options.batch
    for start in range(0, len(rows), size):
        _score(job, discriminator, [row for row in rows[start : start + size] if "p" not in row])
    return rows


def _discrepancy(job: Job, prompts: list[str]) -> float | None:
    """How far the inputs are from the seeds, as the generator sees them."""
    real = [seed.prompt for seed in job.seeds][:_LIKENESS]
    if len(real) < 2 or len(prompts) < 2:
        return None
    some = [prompts[i] for i in sorted(order(len(prompts), job.options.seed)[:_LIKENESS])]
    both = _features(job, "generator", [*real, *some])
    unit = both.std(0, correction=0)
    both = torch.where(unit > 1e-9, (both - both.mean(0)) / unit.clamp(min=1e-9), 0.0)
    return mean_discrepancy(both[: len(real)], both[len(real) :])
