"""What a short training after a squeeze or a rounding gave back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RecoverReport:
    """`nll` is the mean negative log-likelihood of an answer's token, `answers` the share that the model would give
    word for word, both on rows that were not trained on, None where none were held out.

    `losses` are of single steps; the state after `best_step` was kept. `rounding`: in which codes it was trained and
    is stored, empty for plain numbers.
    """

    rows: int
    held_out: int
    steps: int
    best_step: int
    tokens: int
    seconds: float
    nll_before: float | None
    nll_after: float | None
    answers_before: float | None
    answers_after: float | None
    losses: tuple[float, ...]
    rounding: str
    bytes_before: int
    bytes_after: int
    output: str
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
