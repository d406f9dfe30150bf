"""What a transfer's page shows of the rows in its files, which anybody may have edited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from loratools.reports.blocks import Block, histograms, paragraph, table
from loratools.reports.transfer import Synthesis, TransferReport
from loratools.training.seeds import order
from loratools.training.transfer.discriminator import read_discriminator
from loratools.training.transfer.job import DISCRIMINATOR, INPUTS, LABELLED, REJECTED
from loratools.training.transfer.stage_files import StageFiles

_SAMPLES: Final = 20  # of accepted and of rejected inputs
_LONGEST: Final = 1000  # characters of a text

_REASONS: Final = {
    "empty": "empty",
    "unfinished": "did not end",
    "improbable": "improbable",
    "duplicate": "the same again",
    "similar": "nearly the same",
}


def scores_of(made: Synthesis, files: StageFiles) -> Block:
    """How probable real inputs are, and accepted and rejected ones; the real ones as they were scored unseen."""
    rejected = files.rows(REJECTED)
    kinds = {"duplicates": ("duplicate", "similar"), "rejected as improbable": ("improbable",)}
    scores: dict[str, Sequence[float]] = {
        "real inputs, unseen": read_discriminator(files.folder / DISCRIMINATOR).unseen,
        "accepted": _probabilities(files.rows(INPUTS)),
    }
    for name, reasons in kinds.items():
        scores[name] = _probabilities(row for row in rejected if row.get("reason") in reasons)
    return histograms(
        "Scores of the discriminator", scores, x="probability that the input is a real one", threshold=made.least
    )


def samples_of(report: TransferReport, files: StageFiles) -> Iterator[Block]:
    """Some of the accepted inputs with the teacher's answers, and some of the rejected ones with the reasons."""
    seed = report.settings["seed"]
    answers = {(repr(row.get("id")), row["prompt"]): row for row in files.rows(LABELLED)}
    kept = files.rows(INPUTS)
    rows = []
    for row in _some(kept, seed):
        answer = answers.get((repr(row.get("id")), row["prompt"]), {})
        unfinished = "" if answer.get("ended", True) else " (did not end)"
        said = answer.get("answer")
        told = None if not isinstance(said, str) else _cut(said if said.strip() else "(empty)") + unfinished
        rows.append((_cut(row["prompt"]), told, _probability(row), _number(answer.get("confidence"))))
    yield table(
        [("Input", "prose"), ("The teacher's answer", "prose"), ("Score", "number"), ("Confidence", "number")],
        rows,
        title=f"Accepted: {len(rows)} of {len(kept):,}",
        tall=True,
    )
    rejected = files.rows(REJECTED)
    told_off = [
        (_cut(row["prompt"]), _REASONS.get(str(row.get("reason")), _cut(str(row.get("reason")))), _probability(row))
        for row in _some(rejected, seed)
    ]
    if told_off:
        yield table(
            [("Input", "prose"), ("Why", "text"), ("Score", "number")],
            told_off,
            title=f"Rejected: {len(told_off)} of {len(rejected):,}",
            tall=True,
        )
    yield paragraph(
        "Chosen by the seed. Line ends and signs that cannot be seen are spelt out. The teacher was not asked about "
        "rejected inputs."
    )


def _some(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """A few rows, the same for the same seed, in their order."""
    return [rows[i] for i in sorted(order(len(rows), seed)[:_SAMPLES])] if rows else []


def _probabilities(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    return [p for row in rows if (p := _probability(row)) is not None]


def _probability(row: Mapping[str, Any]) -> float | None:
    """The score of a row; None where it has none, or an editor has left something else."""
    p = _number(row.get("p"))
    return p if p is not None and 0 <= p <= 1 else None


def _number(value: object) -> float | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53
    return float(value) if isinstance(value, float) or whole else None  # type: ignore[arg-type]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"
