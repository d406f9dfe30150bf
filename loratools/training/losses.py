"""What a student is told it did wrong: losses over the tokens of answers, each a weighted mean of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def cross_entropy(logits: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Of (tokens, words) logits and the word that each token should have been."""
    losses = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    return _mean(losses, weights)


def divergence(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of (tokens, words) logits over one vocabulary, softened by the temperature T."""
    said = torch.log_softmax(student.float() / temperature, -1)
    meant = torch.log_softmax(teacher.float() / temperature, -1)
    return temperature**2 * _mean((meant.exp() * (meant - said)).sum(-1), weights)


def sorted_distance(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Universal logit distillation (Boizard et al. 2024): the L1 distance of sorted probabilities, any vocabularies."""
    said = torch.softmax(student.float(), -1).sort(-1, descending=True).values
    meant = torch.softmax(teacher.float(), -1).sort(-1, descending=True).values
    most = max(said.shape[-1], meant.shape[-1])
    said, meant = (torch.nn.functional.pad(p, (0, most - p.shape[-1])) for p in (said, meant))
    return _mean((said - meant).abs().sum(-1), weights)


def shared_starts(student: Sequence[int | None], teacher: Sequence[int | None]) -> list[tuple[int, int]]:
    """Pairs of tokens (of the student, of the teacher) that begin at the same character; None begins nowhere."""
    places = {start: i for i, start in reversed(list(enumerate(teacher))) if start is not None}
    return [(i, places[start]) for i, start in enumerate(student) if start is not None and start in places]


def token_starts(tokenizer: Any, ids: Sequence[int], answer: str) -> list[int | None]:
    """The character of `answer` at which each of its tokens begins, and the end token behind them.

    None where a token begins inside a character, or where its beginnings cannot be told.
    """
    starts: list[int | None] = []
    for i in range(len(ids) + 1):
        before = str(tokenizer.decode(list(ids[:i]), skip_special_tokens=True))
        if answer.startswith(before):
            starts.append(len(before))
        elif answer.startswith(f" {before}"):  # decoding drops the blank before the first word in some tokenizers
            starts.append(len(before) + 1)
        else:
            starts.append(None)
    return starts


def _mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights).sum() / weights.sum()
