"""Which made-up inputs are kept, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from loratools.training.seeds import number_of
from loratools.training.transfer.duplicates import Duplicates
from loratools.training.transfer.prompt_frame import PromptFrame
from loratools.training.transfer.settings import Transfer

REASONS: Final = ("empty", "unfinished", "duplicate", "similar", "improbable")
_PARTS: Final = 1 << 56  # of number_of


class Sieve:
    """Takes rows in order; the same rows give the same answers. `seeds` are inputs that there are already,
    `floor` a probability that is enough, whatever the threshold."""

    def __init__(self, options: Transfer, frame: PromptFrame, seeds: Iterable[str], floor: float = 1.0) -> None:
        self._options, self._frame = options, frame
        self.least = min(options.threshold, floor)  # probability that passes a threshold
        self._duplicates = Duplicates(options.similar)
        for seed in seeds:
            self._duplicates.is_new(frame.inside(seed))
        self.counts: Counter[str] = Counter()

    def reason(self, row: dict[str, Any]) -> str:
        """Why the row is left out; nothing where it is kept. Duplicates are of rows that passed otherwise."""
        found = self._reason(row)
        self.counts[found or "kept"] += 1
        return found

    def _reason(self, row: dict[str, Any]) -> str:
        if row.get("flaw"):
            return str(row["flaw"])
        inside = self._frame.inside(row["prompt"]).strip()
        if not inside:
            return "empty"
        if not self._is_probable(row):
            return "improbable"
        return self._duplicates.likeness(inside)

    def _is_probable(self, row: dict[str, Any]) -> bool:
        p = row.get("p")
        if self._options.passing == "none" or p is None:
            return True
        if self._options.passing == "threshold":
            return bool(p >= self.least)
        odds = p / (1 - p) if p < 1 else 1.0
        return number_of(self._options.seed, "accept", row.get("id")) / _PARTS < odds
