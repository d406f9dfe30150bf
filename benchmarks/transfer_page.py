"""The page of a real transfer: what every contestant can do, how it learnt, and some of the rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contestants import table

UNFILTERED, FILTERED = "distilled, unfiltered", "distilled, filtered by the seeds"
MADE_WITH, WARM = "distilled, filtered by a kit", "the same, warm start"
ROBUST, DORA = "the same, robust weights", "unfiltered, to DoRA on its own base"
DORA_KL, DORA_COPIED = "the same, by probabilities too", "copied and trained, to DoRA on its own base"
SOURCE = "the adapter on its own base"
ACCEPTED, OF_A_REASON = 6, 3  # rows that are shown


_TRAINING = (
    "How training went: share of held-out answers that are the teacher's word for word, in %, in brackets the NLL of "
    "a token. The rows held out are those of each contestant; on real data they are true answers."
)


@dataclass(frozen=True)
class Line:
    """What one contestant can do; seconds of the stages that made it, looks at held-out rows on the way.

    A look has the step, the share of whole answers that agree with the teacher, and the NLL of a token.
    """

    name: str
    base: str
    exact: float
    nll: float
    stages: dict[str, float] = field(default_factory=dict)
    kept: str = ""
    looks: list[list[float]] = field(default_factory=list)
    scoring: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Line:
        """What an earlier run wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def told(line: Line) -> list[str]:
    """As a row of a table."""
    made = f"{sum(line.stages.values()):.0f}" if line.stages else ""
    return [line.name, line.base, f"{line.exact:.3f}", f"{line.nll:.4f}", made, line.kept]


def page(lines: Sequence[Line], files: Path, about: dict[str, Any]) -> str:
    """All of it, as Markdown; `files` are those of the transfer whose rows are shown."""
    source = next(line.exact for line in lines if line.name == SOURCE)
    rows = []
    for line in lines:
        name, base, exact, *rest = told(line)
        rows.append([name, base, exact, f"{100 * line.exact / source:.0f} %" if source else "", *rest])
    return "\n\n".join(
        [
            "# Transferred without data",
            _text(about, robust=any(line.name == ROBUST for line in lines)),
            table(["", "base", "exact", "of the adapter", "NLL", "seconds", "kept"], rows),
            "Seconds of each stage:",
            _stages(lines),
            _TRAINING,
            _curves(lines),
            *_rows(files),
        ]
    )


def _text(about: dict[str, Any], *, robust: bool) -> str:
    weighed = (
        " Robust weights: rows count by how sure the source is of its answer and how much a second, sampled one "
        "differs; a fifth is dropped."
    )
    return (
        "en_lora_r64 (number words, LoRA of rank 64 on SmolLM2-135M-Instruct) moved to Gemma-3-270M, a base model of "
        f"another family, tokenizer, width and depth. Distilled: {about['seeds']} inputs of the training data and no "
        f"answer were shown to Gemma, which made up {about['samples']} others; the source with its adapter answered "
        "them. Unfiltered: as they came, but for duplicates. Filtered by the seeds: by a discriminator of these "
        f"{about['seeds']}, which so few teach little; by a kit: by one that was made with the adapter "
        f"(`--prepare-only`) while {about['known']} inputs of its task were there, as the paper has it. Warm start: "
        f"training begins with what the weights by bases made of the adapter.{weighed if robust else ''} Weights: "
        "nothing is trained; by singular vectors of the bases, or "
        f"by what both make of {about['texts']} labelled rows. Real data: as many rows of the adapter's own training "
        f"data, with their true answers. All train LoRA of rank {about['rank']} for {about['steps']} steps of "
        f"{about['of']} rows, AdamW at {about['rate']:g}; a tenth of the rows decides which step is kept. DoRA: the "
        "same rows, unfiltered or filtered by a kit, to DoRA of the same rank on the adapter's own base; there both "
        "have one vocabulary, so that the source's probabilities can be learnt beside its words (`--loss kl`, which is "
        "the default there), and one shape, so that training can begin with a copy (`--warm-start --align none`), "
        "squeezed to the rank; all others learn words alone (`--loss ce`). Exact: share "
        f"of {about['rows']} held-out greedy answers that are right word for word (standard error at most "
        f"{0.5 / about['rows'] ** 0.5:.3f}); NLL: of an answer token, which tokenizers split differently: compare it "
        "within a base. Seconds: to make it, on a machine with other work, with the generated and labelled rows that "
        "it took over from another contestant. Kept: inputs kept of those generated. One task, one seed."
    )


def _stages(lines: Sequence[Line]) -> str:
    names = ("prepare", "generate", "filter", "label", "start", "train")
    rows = [[line.name, *(f"{line.stages[n]:.0f}" if n in line.stages else "" for n in names)] for line in lines]
    return table(["", *names], [row for row in rows if any(row[1:])])


def _curves(lines: Sequence[Line]) -> str:
    some = [line for line in lines if line.looks]
    steps = sorted({look[0] for line in some for look in line.looks})
    by_step = [{look[0]: f"{100 * look[1]:.0f} ({look[2]:.3f})" for look in line.looks} for line in some]
    return table(
        ["step", *(line.name for line in some)], [[str(s), *(one.get(s, "") for one in by_step)] for s in steps]
    )


def _rows(files: Path) -> list[str]:
    """Some that were accepted, with their labels, some that were not, and how many labels are right."""
    from real.words import right_answer

    labelled, rejected = (_read(files / name) for name in ("labelled.jsonl", "rejected.jsonl"))
    sure = {row["prompt"]: row.get("p") for row in _read(files / "inputs.jsonl")}
    numbers = [row for row in labelled if right_answer(row["prompt"]) is not None]
    right = sum(row["answer"].strip() == right_answer(row["prompt"]) for row in numbers)
    lengths = [
        sum(len(row["prompt"].partition("\n")[0]) - len("Number: ") == n for row in numbers) for n in range(1, 7)
    ]
    shown = [
        [
            f"`{row['prompt']!r}`",
            row["answer"].strip().replace("|", "\\|"),
            "yes" if row["answer"].strip() == right_answer(row["prompt"]) else "no",
            _number(sure.get(row["prompt"])),
        ]
        for row in labelled[:ACCEPTED]
    ]
    dropped = []
    for reason in dict.fromkeys(row["reason"] for row in rejected):
        some = [row for row in rejected if row["reason"] == reason][:OF_A_REASON]
        dropped += [[f"`{row['prompt']!r}`".replace("|", "\\|"), reason, _number(row.get("p"))] for row in some]
    told = (
        f"Of the {len(labelled)} filtered inputs {len(numbers)} are numbers below a million, of 1 to 6 digits "
        f"{', '.join(map(str, lengths))}; the adapter's answers to {right} of them are right. The first of them, with "
        "p, the probability that the input is a real one:"
    )
    found = [told, table(["input", "label", "right", "p"], shown)]
    if dropped:
        found += [f"Of the {len(rejected)} that were rejected:", table(["input", "reason", "p"], dropped)]
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _number(p: float | None) -> str:
    return "" if p is None else f"{p:.2f}"
