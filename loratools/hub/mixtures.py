"""Which adapters are weighted sums of a few others: orthogonal matching pursuit on sketches, which are linear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.hub.nearest import correlations
from loratools.hub.pairs import Regression, least_squares

if TYPE_CHECKING:
    from torch import Tensor

MOST_TERMS = 4
LEAST_TERM = 0.4  # of |cosine| with the nearest term: of four equal, orthogonal ones each has 0.5


@dataclass(frozen=True)
class Mixture:
    """One row as a sum of others."""

    row: int
    terms: tuple[int, ...]
    is_positive: bool  # all weights
    size: float  # sum of |weight| times the norm of the term, over the norm of the row

    @property
    def together(self) -> frozenset[int]:
        """The rows that depend on each other linearly."""
        return frozenset((self.row, *self.terms))


def mixtures(units: Tensor, suspects: Sequence[int], threshold: float) -> list[Mixture]:
    """The suspects whose direction others span to a cosine of the threshold, two terms at least, each of which matters.

    Where y is a sum of a and b, a is one of y and b as well: of rows that depend on each other one is told, that which
    needs no negative weight, or else the least weights. Terms that are such sums themselves are avoided if others do.
    """
    found = _pursued(units, suspects, threshold, set())
    made = {m.row: m for m in _preferred(found) if m.is_positive}
    again = {m.row: m for m in _pursued(units, [m.row for m in found], threshold, set(made))}
    return _preferred([*(made | again).values()])


def _preferred(found: Sequence[Mixture]) -> list[Mixture]:
    best: dict[frozenset[int], Mixture] = {}
    for mixture in sorted(found, key=lambda m: (not m.is_positive, m.size, m.row)):
        best.setdefault(mixture.together, mixture)
    return sorted(best.values(), key=lambda m: m.row)


def _pursued(units: Tensor, suspects: Sequence[int], threshold: float, barred: set[int]) -> list[Mixture]:
    found = []
    usable = torch.ones(len(units), dtype=torch.bool)
    usable[list(barred)] = False
    rows = torch.tensor(list(suspects), dtype=torch.int64)
    terms: list[list[int]] = [[] for _ in suspects]
    active = list(range(len(suspects)))
    for turn in range(MOST_TERMS):
        residuals = torch.stack([_residual(units, int(rows[i]), terms[i]) for i in active]) if active else units[:0]
        going = []
        for i, (value, term) in zip(active, _next_terms(units, residuals, rows[active], usable), strict=True):
            if term in terms[i] or value < (LEAST_TERM if turn == 0 else 1e-4):
                continue
            terms[i].append(term)
            going.append(i)
        active = [i for i in going if _numbers(units, int(rows[i]), terms[i]).relative_error > 1e-4]
    for i, row in enumerate(rows.tolist()):
        if (mixture := _lean(units, row, terms[i], threshold)) is not None:
            found.append(mixture)
    return found


def _next_terms(units: Tensor, residuals: Tensor, rows: Tensor, usable: Tensor) -> Iterator[tuple[float, int]]:
    """The row that tells most of each residual, with |<residual, row>|."""
    for start, part in correlations(units, residuals):
        part.masked_fill_(~usable, 0.0)
        mine = rows[start : start + len(part)]
        part[torch.arange(len(part)), mine] = 0.0
        values, terms = part.max(1)
        yield from zip(values.tolist(), terms.tolist(), strict=True)


def _residual(units: Tensor, row: int, terms: Sequence[int]) -> Tensor:
    """What the terms leave of a row, with their best weights."""
    if not terms:
        return units[row]
    columns = units[list(terms)].double().T
    target = units[row].double()
    weights = torch.linalg.lstsq(columns, target.unsqueeze(1), driver="gelsd").solution
    return (target - (columns @ weights).squeeze(1)).float()


def _numbers(units: Tensor, row: int, terms: Sequence[int]) -> Regression:
    held = units[[row, *terms]].double()
    return least_squares(held @ held.T)


def _lean(units: Tensor, row: int, terms: Sequence[int], threshold: float) -> Mixture | None:
    """The mixture without the terms that do not matter; None where fewer than two are left, or they span too little."""
    kept = list(terms)
    while len(kept) > 1:
        numbers = _numbers(units, row, kept)
        if numbers.relative_error**2 > 1 - threshold**2:
            return None
        if numbers.is_lean():
            return Mixture(row, tuple(kept), all(w > 0 for w in numbers.weights), sum(map(abs, numbers.weights)))
        del kept[min(range(len(kept)), key=lambda k: numbers.without[k])]
    return None
