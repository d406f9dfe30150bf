"""Numbers that summarise a spectrum. A spectrum is a descending sequence of singular values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def frobenius_norm(spectrum: Sequence[float]) -> float:
    """sqrt(sum s^2)."""
    return math.hypot(*spectrum)


def spectral_norm(spectrum: Sequence[float]) -> float:
    """The largest singular value; 0 for an empty spectrum."""
    return max(spectrum, default=0.0)


def nuclear_norm(spectrum: Sequence[float]) -> float:
    """sum s."""
    return math.fsum(spectrum)


def effective_rank(spectrum: Sequence[float]) -> float:
    """exp of the entropy of s / sum s (Roy and Vetterli 2007); 0 for a zero operator."""
    total = math.fsum(spectrum)
    if total == 0.0:
        return 0.0
    shares = [s / total for s in spectrum if s > 0.0]
    return math.exp(-math.fsum(p * math.log(p) for p in shares))


def stable_rank(spectrum: Sequence[float]) -> float:
    """||.||_F^2 / ||.||_2^2; 0 for a zero operator."""
    top = spectral_norm(spectrum)
    return math.fsum((s / top) ** 2 for s in spectrum) if top else 0.0


def energy(spectrum: Sequence[float], rank: int) -> float:
    """The share of squared singular values among the first `rank`; 1 for a zero operator."""
    top = spectral_norm(spectrum)
    if top == 0.0:
        return 1.0
    squares = [(s / top) ** 2 for s in spectrum]
    return min(1.0, math.fsum(squares[:rank]) / math.fsum(squares))
