"""The page of a transfer: one HTML file, out of the report and the files that the stages left."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from loratools.reports.blocks import (
    Block,
    Card,
    Line,
    Section,
    beside,
    block_page,
    curves,
    facts,
    hidden,
    paragraph,
    spreads,
    table,
)
from loratools.reports.pages import check_place
from loratools.reports.transfer import Distillation, Synthesis, TransferReport
from loratools.sizes import format_size
from loratools.storage.atomic import write_whole
from loratools.training.transfer.job import DISCRIMINATOR
from loratools.training.transfer.page_rows import samples_of, scores_of
from loratools.training.transfer.stage_files import StageFiles

_KINDS: Final = {"seeds": "seeds", "generated": "generated, whole", "kept": "accepted"}


def write_page(report: TransferReport, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a transfer as one page; the same report and files give the same bytes. What it took is told at its end.

    Reads the rows in the report's work folder; seeds are counted there, and not shown. Raises UsageError for a suffix
    other than .html, and OutputError where the file exists and `force` is not given, or cannot be written.
    """
    return write_whole(check_place(path, force=force), _page(report).encode("utf-8"))


def _page(report: TransferReport) -> str:
    files = StageFiles(Path(report.work))
    made = report.synthesis
    sections = (
        Section("moved", "What was moved", tuple(_moved(report))),
        Section("acceptance", "Acceptance", tuple(_acceptance(report, files))),
        Section("diversity", "Diversity", tuple(_diversity(made))),
        Section("agreement", "Agreement with the teacher", tuple(_agreement(report))),
        Section("curves", "Learning curves", tuple(_curves(report))),
        Section("samples", "Samples", tuple(samples_of(report, files))),
        Section("time", "Time", (_time(report),)),
    )
    tags = ["self-prompted"] if made.inputs == "self-prompted" else []
    about = (
        f"From {report.source} to {report.target}. {_with('input', made.kept)} that a model made up, answered by the "
        "teacher, which is the old base with the old adapter, and learnt in "
        f"{_with('step', report.distillation.steps)}."
    )
    title = f"{_name(report.adapter)}, moved to {_name(report.target)}"
    return block_page("transfer", title, about, sections, cards=_cards(report), tags=tags, notes=report.warnings)


def _cards(report: TransferReport) -> Iterator[Card]:
    made = report.synthesis
    yield Card("Accepted", _percent(made.acceptance), f"{made.kept:,} of {made.generated:,} generated inputs")
    if made.distinct_2 is None:  # all are single words
        yield Card("Different words", _percent(made.distinct_1), "distinct-1 of the accepted inputs")
    else:
        yield Card("Different pairs of words", _percent(made.distinct_2), "distinct-2 of the accepted inputs")
    before = "nothing was held out"
    if report.agreement_before is not None:
        before = f"of held-out answers{_unsqueezed(report)}; before training: {_percent(report.agreement_before)}"
    yield Card("Agrees with the teacher", _percent(report.agreement), before)
    yield Card("New adapter", format_size(report.bytes), f"{report.method} of rank {report.rank}")


def _moved(report: TransferReport) -> Iterator[Block]:
    moved, made = report.moved, report.synthesis
    ranks = ", ".join(map(str, moved.ranks))
    yield table(
        [("", "text"), ("From", "prose"), ("To", "prose")],
        [
            ("adapter", report.adapter, report.output),
            ("base", report.source, report.target),
            ("model type", moved.source_type, moved.target_type),
            ("kind", ", ".join(moved.families), report.method),
            ("rank", ranks, str(report.rank)),
        ],
    )
    told = {"inputs": "self-prompted: the source with its adapter was only told to begin"}
    if made.inputs == "few-shot":
        told = {"inputs": f"made up after {_with('seed', made.seeds)}", "made up by": report.generator}
    if (start := report.warm_start) is not None:
        told["began with"] = f"what the weights carry over ({start.align})"
    told["stages' files"] = report.work
    if report.squeezed is not None:
        told["squeezed"] = f"to rank {report.rank}, with a relative error of {_percent(report.squeezed)}"
    yield facts(told)
    yield hidden("All settings", facts(dict(_flat(report.settings))))


def _acceptance(report: TransferReport, files: StageFiles) -> Iterator[Block]:
    made = report.synthesis
    whole = made.generated - made.empty - made.unfinished
    passed = whole - made.improbable
    sifted = made.discriminator_loss is not None and (files.folder / DISCRIMINATOR).is_file()
    counts = [
        ("generated", made.generated),
        ("– empty", made.empty),
        ("– did not end within the tokens allowed", made.unfinished),
        *([("– improbable to the discriminator", made.improbable)] if sifted else []),
        ("passed the discriminator" if sifted else "whole", passed),
        ("– the same as a seed or an earlier input", made.duplicate),
        ("– nearly the same: shares its n-grams", made.similar),
        ("accepted", made.kept),
    ]
    yield table(
        [("Inputs", "text"), ("Count", "number"), ("Share", "share"), ("", "bar")],
        [(name, n, n / made.generated, n / made.generated) for name, n in counts],
        strong=(0, len(counts) - 4, len(counts) - 1),
    )
    if not sifted:
        yield paragraph("There was no discriminator: all inputs passed that were whole.")
        return
    origin = (
        "saved with the adapter"
        if made.discriminator == "kit"
        else "made here, of the seeds and of inputs that were made up first"
    )
    yield paragraph(
        f"The discriminator was {origin}. Its cross-validated loss is {made.discriminator_loss:.3f} nats; at 0.693 it "
        "could not tell real inputs from made-up ones."
    )
    if made.least is not None and made.least < report.settings["threshold"]:
        yield paragraph(
            f"Real inputs were few, so what looks as real as the oddest of them passes, from {made.least:.3g} on; the "
            f"threshold asked for is {report.settings['threshold']:g}."
        )
    yield scores_of(made, files)


def _diversity(made: Synthesis) -> Iterator[Block]:
    kinds = [(name, made.diversity[kind]) for kind, name in _KINDS.items() if kind in made.diversity]
    if not kinds:
        yield paragraph("The run that left these files did not note it; begin the filter anew to have it.")
        return
    columns = ["Distinct-1", "Distinct-2", "Distinct-3", "Median words"]
    rows = [[name, d.inputs, d.distinct_1, d.distinct_2, d.distinct_3, d.words[2]] for name, d in kinds]
    few = ""
    if made.seeds:
        columns.append(f"Distinct-2 of {made.seeds} at a time")
        rows = [[*row, d.distinct_2_few] for row, (_, d) in zip(rows, kinds, strict=True)]
        few = " Beside the seeds, read the column of as many at a time."
    yield table([("", "text"), ("Inputs", "number"), *((name, "number") for name in columns)], rows)
    yield paragraph(
        "Distinct-n is the share of all runs of n words that differ, without what all inputs have in common. It falls "
        f"with the number of inputs.{few}"
    )
    if made.discrepancy is not None:
        yield facts({"distance of inputs and seeds": f"{made.discrepancy:.3g} (squared maximum mean discrepancy)"})
    yield spreads("Lengths of inputs", {name: d.characters for name, d in kinds}, x="characters")


def _agreement(report: TransferReport) -> Iterator[Block]:
    trained, taught = report.distillation, report.labelling
    looks = {look.step: look for look in trained.looks}
    if 0 in looks and trained.best_step in looks:
        rows = [
            ("before training", looks[0]),
            (f"with the adapter, step {trained.best_step}{_unsqueezed(report)}", looks[trained.best_step]),
        ]
        yield table(
            [("Model", "text"), ("Whole answers", "share"), ("Tokens", "share"), ("NLL of a token", "number")],
            [(name, look.answers, look.tokens, look.nll) for name, look in rows],
        )
        yield paragraph(
            f"On {_with('held-out row', trained.held_out)}, each token told what the teacher said before it. The step "
            "was chosen by these very rows, which flatters it a little."
        )
    else:
        yield paragraph("No rows were held out: agreement is not known.")
    if report.evaluations:
        yield table(
            [("Model", "text"), ("Exact match", "share"), ("NLL of a token", "number"), ("Rows", "number")],
            [(name, one.exact_match, one.nll, one.rows) for name, one in report.evaluations.items()],
            title="On the rows of --eval",
        )
    yield facts(
        {
            "answers used": f"{taught.used:,}, with a mean confidence of {taught.confidence:.3f}",
            "left out": f"{taught.empty:,} empty, {taught.unfinished:,} that did not end",
        }
    )


def _curves(report: TransferReport) -> Iterator[Block]:
    trained = report.distillation
    looks = trained.looks
    kept = trained.best_step if looks else None
    loss = [
        Line("training loss", [(step, loss) for step, loss in enumerate(trained.losses, 1)], "third"),
        Line("held-out NLL of a token", [(look.step, look.nll) for look in looks], "first", marked=True),
    ]
    drawn = [curves("Loss", loss, x="step", y="nats", kept=kept)]
    if looks:
        agreed = [
            Line("whole answers", [(look.step, look.answers) for look in looks], "first", marked=True),
            Line("tokens", [(look.step, look.tokens) for look in looks], "second", marked=True),
        ]
        drawn.append(
            curves("Agreement on held-out rows", agreed, x="step", y="% as the teacher", share=True, kept=kept)
        )
    yield beside(*drawn)
    yield paragraph(_ended(trained, report.settings["train"]["loss"]))


def _ended(trained: Distillation, loss: str) -> str:
    early = " It ended early, as agreement no longer grew." if trained.stopped_early else ""
    two = "" if loss == "ce" else f" The training loss is not the held-out one: the probabilities count too ({loss})."
    return f"{_with('row', trained.rows)} trained on, {trained.tokens:,} tokens in all.{early}{two}"


def _time(report: TransferReport) -> Block:
    """The one place of the page that differs between runs of the same."""
    rows = list(report.rows())
    total = sum(row["seconds"] for row in rows)
    return table(
        [("Stage", "text"), ("Time", "seconds"), ("Tokens", "number"), ("Tokens a second", "number")],
        [
            *((row["stage"], row["seconds"], row["tokens"], row["tokens_per_second"]) for row in rows),
            ("all", total, None, None),
        ],
        strong=(len(rows),),
    )


def _unsqueezed(report: TransferReport) -> str:
    return "" if report.squeezed is None else ", before it was squeezed"


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", "–" if value is None else str(value)


def _name(place: str) -> str:
    return Path(place).name or place


def _with(what: str, n: int) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"
