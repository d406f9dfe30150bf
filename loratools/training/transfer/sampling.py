"""Texts out of models: sampled ones, which are the same whenever their batch is, and greedy ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import UsageError
from loratools.training.generating import end_ids, generating
from loratools.training.models import library
from loratools.training.prompts import pad_id
from loratools.training.seeds import seeded

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Temperature and nucleus; a temperature of 0 is greedy decoding."""

    temperature: float = 0.9
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"temperature {self.temperature:g}, top_p {self.top_p:g}: give at least 0, and a share above 0"
            )


@dataclass(frozen=True)
class Said:
    """What a model went on with: its tokens, their text, whether it came to an end by itself, and the token of that."""

    ids: tuple[int, ...]
    text: str
    ended: bool
    end: int | None = None


def said(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_tokens: int,
    device: str,
    stop: str | None = None,
    seed: int = 0,
) -> list[Said]:
    """What follows each of the prompts, one batch: up to the end token, or the text `stop`, which is cut off.

    Depends on the prompts and the seed alone. Prompts of different lengths are padded on the left.
    """
    most = max(map(len, prompts))
    pad, ends = pad_id(tokenizer), end_ids(model, tokenizer)
    ids = torch.tensor([[pad] * (most - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (most - len(p)) + [1] * len(p) for p in prompts], device=device)
    criteria = library("transformers").StoppingCriteriaList()
    if stop is not None:
        criteria.append(_until(stop, tokenizer, most))
    settings = generating(
        model, tokenizer, asked=most, max_tokens=max_tokens, temperature=sampling.temperature, top_p=sampling.top_p
    )
    with torch.no_grad(), seeded("said", seed), settings as how:
        out = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=how, stopping_criteria=criteria
        ).tolist()
    return [_said(tokenizer, row[most:], ends, stop) for row in out]


def _said(tokenizer: Any, ids: Sequence[int], ends: Sequence[int], stop: str | None) -> Said:
    at = next((i for i, one in enumerate(ids) if one in ends), None)
    kept, end = list(ids[:at]), None if at is None else ids[at]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    if stop is not None:
        # blanks and line ends before the first word are no end: a model may begin with them
        lead = len(text) - len(text.lstrip())
        cut = text.find(stop, lead)
        if cut >= 0:
            return Said(tuple(kept), text[:cut], True)
    return Said(tuple(kept), text, end is not None, end)


def _until(stop: str, tokenizer: Any, start: int) -> Any:
    """Ends a row as soon as its own words hold `stop`."""

    class Until(library("transformers").StoppingCriteria):  # type: ignore[misc]
        def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
            texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
            return torch.tensor([stop in text.lstrip() for text in texts], device=ids.device)

    return Until()
