"""Made-up inputs, batch by batch: each the same whenever it is made, whatever happened to the batches before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loratools.errors import AdapterError
from loratools.training.prompts import prompt_ids
from loratools.training.seeds import number_of, order
from loratools.training.transfer.job import Job
from loratools.training.transfer.prompt_frame import Listing, few_shot
from loratools.training.transfer.sampling import said
from loratools.training.transfer.seed_inputs import Seed
from loratools.training.transfer.settings import Transfer

_SENTINEL = "\u241f"  # a sign that no template has


def made_up(job: Job, purpose: str, number: int) -> tuple[list[dict[str, Any]], int]:
    """One batch of rows, and how many tokens they took.

    A row whose input is empty, or did not come to an end, says so under "flaw".
    """
    options, frame = job.options, job.frame
    first = number * options.batch
    amid = options.show == "inputs" and any(frame.after in frame.inside(seed.prompt) for seed in job.seeds)
    if job.seeds:
        model, tokenizer = job.models.take("generator", keep=("source",))
        listing = Listing.of(frame, *_texts(job.seeds, options))
        stop = listing.stop
        chosen = [_chosen(job.seeds, options, purpose, first + i) for i in range(options.batch)]
        prompts = [prompt_ids(tokenizer, few_shot(frame, listing, *_texts(some, options))) for some in chosen]
    else:
        model, tokenizer = job.models.take("teacher")
        prompts, stop = [opening_ids(tokenizer, chat=options.chat)] * options.batch, "\n\n"
    found = said(
        model,
        tokenizer,
        prompts,
        options.sampling,
        max_tokens=options.max_input_tokens,
        device=options.device,
        stop=stop,
        seed=number_of(options.seed, purpose, number),
    )
    rows = []
    for i, one in enumerate(found):
        inside = frame.said(one.text, amid=amid)
        row: dict[str, Any] = {"id": first + i, "batch": number, "prompt": frame.around(inside)}
        if not inside:
            row["flaw"] = "empty"
        elif not one.ended:
            row["flaw"] = "unfinished"
        rows.append(row)
    return rows, sum(len(one.ids) for one in found)


def _chosen(seeds: Sequence[Seed], options: Transfer, purpose: str, number: int) -> list[Seed]:
    return [seeds[i] for i in order(len(seeds), number_of(options.seed, purpose, "shots", number))][: options.shots]


def _texts(seeds: Sequence[Seed], options: Transfer) -> tuple[list[str], list[str]]:
    """Prompts, and the answers where they are shown."""
    return [seed.prompt for seed in seeds], [seed.answer or "" for seed in seeds] if options.show == "pairs" else []


def opening_ids(tokenizer: Any, *, chat: bool) -> list[int]:
    """What stands before every text: the beginning of a user's turn, or the token that texts begin with."""
    if chat:
        turns = [{"role": "user", "content": _SENTINEL}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        return list(tokenizer(text.partition(_SENTINEL)[0], add_special_tokens=False).input_ids)
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise AdapterError("the source's tokenizer has no token that texts begin with; give --seeds")


def whole_batches(rows: Sequence[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """The rows of the first batches that are complete: what a killed run was writing is made again."""
    kept: list[dict[str, Any]] = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        if [row.get("id") for row in batch] != list(range(start, start + size)):
            break
        kept += batch
    return kept


def generate(
    job: Job,
    name: str,
    purpose: str,
    *,
    score: Callable[[list[dict[str, Any]]], None],
    enough: Callable[[list[dict[str, Any]]], bool],
    step: Callable[[int], None],
) -> int:
    """Append batches to the file `name` until `enough` says so of all its rows; how many tokens that took.

    `score` may add to the rows of a batch before they are written.
    """
    rows = whole_batches(job.files.rows(name), job.options.batch)
    job.files.write(name, rows)
    tokens = 0
    while not enough(rows):
        batch, taken = made_up(job, purpose, len(rows) // job.options.batch)
        score(batch)
        job.files.append(name, batch)
        rows += batch
        tokens += taken
        step(taken)
    return tokens
