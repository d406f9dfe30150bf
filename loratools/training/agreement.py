"""How far a model agrees with given answers, told every one of them up to each token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import UsageError
from loratools.training.models import library, room
from loratools.training.prompts import Encoded, collated

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """With the answers of rows, each token given those before it: mean NLL, shares of tokens and of whole answers.

    A whole answer agrees where every token of it is the likeliest: greedy decoding then says the same.
    """

    nll: float
    tokens: float
    answers: float


def agreement_of(model: Any, items: Sequence[Encoded], *, batch: int, device: str) -> Agreement:
    """How far `model` agrees with the answers of rows, which are encoded."""
    was_training = model.training
    model.eval()
    nll, same, whole, count = 0.0, 0, 0, 0
    ordered = sorted(items, key=lambda item: len(item[0]))
    try:
        with torch.no_grad():
            for start in range(0, len(ordered), batch):
                logits, wanted, row = answer_logits(model, ordered[start : start + batch], device)
                nll += float(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none").double().sum())
                hits = logits.argmax(-1) == wanted
                same, count = same + int(hits.sum()), count + len(hits)
                n_rows = min(batch, len(ordered) - start)
                missed = torch.zeros(n_rows, dtype=torch.long, device=row.device).index_add_(0, row, (~hits).long())
                whole += int((missed == 0).sum())
    finally:
        model.train(was_training)
    return Agreement(nll / count, same / count, whole / len(ordered))


def answer_logits(model: Any, items: Sequence[Encoded], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that foretell the tokens of answers, those tokens, and the row of each; the head runs for few others.

    UsageError for a row that the model has no room for.
    """
    ids, mask, wanted = collated(items, device)
    if ids.shape[1] > room(model):
        raise UsageError(
            f"a row of {ids.shape[1]} tokens is too long: the model has room for {room(model)}; shorten it"
        )
    foretold = wanted[:, 1:]
    places = torch.nn.functional.pad(foretold, (0, 1))  # each foretells the token behind it
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    keywords: dict[str, Any] = {"use_cache": False}
    if _runs_head_at(core):
        keywords["logits_to_keep"] = places
    logits = model(input_ids=ids, attention_mask=mask, **keywords).logits
    if logits.ndim == 3:
        logits = logits[places]
    return logits, ids[:, 1:][foretold], places.nonzero()[:, 0]


def _runs_head_at(model: Any) -> bool:
    """Whether a model can be told, by a mask, at which places its head is to run: the largest matrix of a small one."""
    known = hasattr(library("transformers").modeling_utils, "slice_logits_to_keep")
    return known and "logits_to_keep" in inspect.signature(model.forward).parameters
