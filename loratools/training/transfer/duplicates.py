"""Inputs that say again what was said: the very same ones, and long ones that share most of their words."""

from __future__ import annotations

from collections import Counter
from typing import Final, Literal, TypeAlias

_WORDS: Final = 3  # in an n-gram
_SHORT: Final = 8  # words: below, one that differs makes another input, as of numbers

Likeness: TypeAlias = Literal["", "duplicate", "similar"]


class Duplicates:
    """Remembers inputs; `above` is the share of n-grams (Jaccard) beyond which a long input is a duplicate."""

    def __init__(self, above: float = 0.7) -> None:
        self._above = above
        self._seen: set[str] = set()
        self._grams: list[frozenset[tuple[str, ...]]] = []
        self._where: dict[tuple[str, ...], list[int]] = {}

    def is_new(self, text: str) -> bool:
        """Whether no earlier input is the same but for blanks and case, or nearly the same; it is remembered if so."""
        return not self.likeness(text)

    def likeness(self, text: str) -> Likeness:
        """Whether an earlier input is the same, or nearly so; where none is, this one is remembered."""
        words = text.lower().split()
        plain = " ".join(words)
        if plain in self._seen:
            return "duplicate"
        grams = n_grams(words) if len(words) >= _SHORT else frozenset()
        shared = Counter(i for gram in grams for i in self._where.get(gram, ()))
        for i, common in shared.items():
            if common / (len(grams) + len(self._grams[i]) - common) > self._above:
                return "similar"
        self._seen.add(plain)
        for gram in grams:
            self._where.setdefault(gram, []).append(len(self._grams))
        self._grams.append(grams)
        return ""


def n_grams(words: list[str], n: int = _WORDS) -> frozenset[tuple[str, ...]]:
    """The runs of `n` words."""
    return frozenset(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(texts: list[str], n: int) -> float | None:
    """Distinct-n: the share of all runs of `n` words that are different ones; None where no text is so long."""
    runs = [run for text in texts for run in zip(*(text.split()[i:] for i in range(n)), strict=False)]
    return len(set(runs)) / len(runs) if runs else None
