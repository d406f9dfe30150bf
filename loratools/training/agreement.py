"""How far a model agrees with given answers, told every one of them up to each token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
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
    """Logits that foretell the tokens of answers, those tokens, and the row of each; the head runs for few others."""
    ids, mask, wanted = collated(items, device)
    kept = wanted[:, 1:]
    first = int(kept.any(0).nonzero()[0])  # the head is the largest matrix of a small model
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    keywords: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(core.forward).parameters:
        keywords["logits_to_keep"] = ids.shape[1] - first
    logits = model(input_ids=ids, attention_mask=mask, **keywords).logits
    logits = logits[:, -(ids.shape[1] - first) :][:, :-1]
    kept = kept[:, first:]
    rows = torch.arange(len(items), device=ids.device)[:, None].expand_as(kept)[kept]
    return logits[kept], ids[:, 1:][:, first:][kept], rows
