"""What the teacher, the source with its adapter, answers to each input that was kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.training.agreement import answer_logits
from loratools.training.prompts import prompt_ids
from loratools.training.seeds import number_of
from loratools.training.transfer.confidence import edit_share
from loratools.training.transfer.job import INPUTS, LABELLED, Job
from loratools.training.transfer.row_fields import unaskable, unfit
from loratools.training.transfer.sampling import Said, Sampling, said

_GREEDY = Sampling(temperature=0.0)
_AGAIN = Sampling(temperature=0.7)  # of the second pass, whose answers show where the teacher is not sure


def label(job: Job) -> dict[str, Any]:
    """Write the labelled rows of all inputs; what there is of them already is kept.

    Each has the teacher's greedy answer, whether it came to an end, the geometric mean of its tokens' probabilities
    and, for robust weights, how much a second, sampled answer differs. AdapterError where no answer says anything.
    """
    inputs = job.files.rows(INPUTS, unaskable)
    known = {(row.get("id"), row["prompt"]): row for row in job.files.rows(LABELLED, unfit) if "answer" in row}
    job.files.write(LABELLED, [row for row in known.values() if row["prompt"] in {r["prompt"] for r in inputs}])
    _, tokenizer = job.models.take("teacher")
    batches = list(_batches(tokenizer, inputs, job))
    step = job.meter(len(batches), "batches of answers")
    tokens = 0
    for batch in batches:
        missing = [row for row in batch if (row.get("id"), row["prompt"]) not in known]
        taken = 0
        if missing:
            # of a batch all, though some be known: what a row is told must not depend on where a run was killed
            answered, taken = _answered(job, batch)
            new = [row for row in answered if (row["id"], row["prompt"]) not in known]
            job.files.append(LABELLED, new)
            known |= {(row["id"], row["prompt"]): row for row in new}
        tokens += taken
        step(taken)
    rows = [known[row.get("id"), row["prompt"]] for row in inputs]
    job.files.write(LABELLED, rows)  # in the order of the inputs, whatever the batches were
    if not any(row["answer"].strip() for row in rows):
        raise AdapterError(
            "the teacher answers nothing: every answer is empty; are --from and the adapter made for each other, and "
            "do the seeds look as its prompts did? Where answers begin late, raise --max-answer-tokens"
        )
    return {"tokens": tokens}


def _batches(tokenizer: Any, inputs: Sequence[dict[str, Any]], job: Job) -> Iterator[list[dict[str, Any]]]:
    """Prompts of one length go together, so that there is no padding."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in inputs:
        groups.setdefault(len(prompt_ids(tokenizer, row["prompt"], chat=job.options.chat)), []).append(row)
    for _, group in sorted(groups.items()):
        for start in range(0, len(group), job.options.batch):
            yield group[start : start + job.options.batch]


def _answered(job: Job, batch: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    options = job.options
    model, tokenizer = job.models.take("teacher")
    prompts = [prompt_ids(tokenizer, row["prompt"], chat=options.chat) for row in batch]
    ask: dict[str, Any] = {"max_tokens": options.max_answer_tokens, "device": options.device}
    answers = said(model, tokenizer, prompts, _GREEDY, **ask)
    sure = _confidences(model, prompts, answers, options.device)
    again: list[Said] = []
    if options.weighing == "robust":
        number = number_of(options.seed, "again", [row["prompt"] for row in batch])
        again = said(model, tokenizer, prompts, _AGAIN, **ask, seed=number)
    rows = []
    for i, (row, answer) in enumerate(zip(batch, answers, strict=True)):
        made = {"id": row.get("id"), "prompt": row["prompt"], "answer": answer.text, "ended": answer.ended}
        made["confidence"] = round(sure[i], 6)
        if again:
            made["disagreement"] = round(edit_share(answer.ids, again[i].ids), 6)
        rows.append(made)
    return rows, sum(len(one.ids) for one in (*answers, *again))


def _confidences(model: Any, prompts: Sequence[list[int]], answers: Sequence[Said], device: str) -> list[float]:
    """The geometric mean of the probabilities of the tokens of each answer, its end token included."""
    items = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt, *answer.ids, *([] if answer.end is None else [answer.end])]
        items.append((ids, len(prompt)))
    if not any(len(ids) > start for ids, start in items):
        return [0.0] * len(items)
    with torch.no_grad():
        logits, wanted, row = answer_logits(model, items, device)
        logs = -torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none").double()
    sums = torch.zeros(len(items), dtype=torch.float64, device=logs.device)
    counts = sums.index_add(0, row, torch.ones_like(logs))
    means = sums.index_add(0, row, logs) / counts.clamp(min=1)
    return torch.where(counts > 0, means.exp(), 0.0).tolist()
