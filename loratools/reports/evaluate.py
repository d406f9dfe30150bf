"""How well a model does a task."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """Of rows of prompts and answers.

    `nll`: the mean negative log-likelihood, in nats, of a token of an answer, the end token behind it included;
    `exact_match`: the share of the prompts to which the greedy answer is the row's, None where no row has a prompt.
    """

    nll: float
    exact_match: float | None
    rows: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
