"""Which of many sketches are alike: blocked matrix products, in memory that grows with the sketches alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.hub.sketches import LENGTH
from loratools.linalg.projection import SIDE

if TYPE_CHECKING:
    from torch import Tensor

MOST = 32  # relatives kept for each adapter, of those after it
_SHORT = 128  # numbers of a shortened sketch, which tells what is not alike at an eighth of the cost
_SHORTEN_ABOVE = 4096  # sketches: below, the full ones are compared at once
_ROWS, _COLUMNS = 1024, 8192  # of a block
_LIKELY = 0.3  # of a shortened estimate, from which on the full one is looked at for the best of a row
_SIGMAS = 4.0
_GATHERED = 16384  # pairs whose full sketches are compared at once


@dataclass(frozen=True, eq=False)
class Candidates:
    """Pairs of rows, i < j, whose estimated cosine may reach the threshold, by magnitude; the nearest come first.

    `crowded` rows have more relatives after them than are kept. `best` is the greatest magnitude of a row's estimated
    cosine with any other; of very many rows 0 where a shortened estimate says that it is small.
    """

    first: Tensor  # (c,) int64
    second: Tensor  # (c,)
    cosine: Tensor  # (c,) float32, estimated
    crowded: int
    best: Tensor  # (n,) float32


def unit(sketches: Tensor) -> Tensor:
    """Rows of norm 1; those of zeros stay."""
    made = torch.empty_like(sketches)
    for part, out in zip(sketches.split(_GATHERED), made.split(_GATHERED), strict=True):
        wide = part.double()
        norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        out.copy_(wide / norms.clamp_min(torch.finfo(torch.float64).tiny))
    return made


def margin(threshold: float, *, shortened: bool = False) -> float:
    """How far below the threshold an estimate may lie: four standard errors, for updates of one target of rank 1."""
    variance = 2 / SIDE + (1 / _SHORT if shortened else 0)
    return _SIGMAS * (1 - threshold**2) * math.sqrt(variance)


def cut(threshold: float, *, shortened: bool = False) -> float:
    """The least estimate of a candidate; below twice the margin, half the threshold."""
    return max(threshold - margin(threshold, shortened=shortened), threshold / 2)


def candidates(
    units: Tensor, threshold: float, *, step: Callable[[int], Callable[[], None]] | None = None
) -> Candidates:
    """All pairs of unit rows that may be alike; each row keeps the `MOST` nearest of those after it.

    `step` is told how many blocks there are, and what it gives is called after each.
    """
    count = len(units)
    short = _shortened(units) if count > _SHORTEN_ABOVE else None
    least, least_short = cut(threshold), cut(threshold, shortened=True)
    tick = step(-(-count // _ROWS)) if step is not None else lambda: None
    best = torch.zeros(count)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    crowded = 0
    for start in range(0, count, _ROWS):
        rows, columns, cosines = _of_rows(units, short, start, least_short if short is not None else least, best)
        enough = cosines >= least if short is not None else torch.ones_like(cosines, dtype=torch.bool)
        rows, columns, cosines, full = _nearest(rows[enough], columns[enough], cosines[enough])
        crowded += full
        kept.append((rows, columns, (units[rows] * units[columns]).sum(1) if len(rows) else cosines))
        tick()
    first, second, cosine = (torch.cat(parts) for parts in zip(*kept, strict=True)) if kept else _nothing()
    order = torch.sort(cosine.abs(), descending=True, stable=True).indices
    return Candidates(first[order], second[order], cosine[order], crowded, best)


def _nothing() -> tuple[Tensor, Tensor, Tensor]:
    none = torch.zeros(0, dtype=torch.int64)
    return none, none, torch.zeros(0)


def _of_rows(
    units: Tensor, short: Tensor | None, start: int, least: float, best: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, |cosine|) of the pairs of a block of rows with all that come after."""
    used = units if short is None else short
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    stop = min(start + _ROWS, len(used))
    for left in range(start, len(used), _COLUMNS):
        right = min(left + _COLUMNS, len(used))
        block = (used[start:stop] @ used[left:right].T).abs_()
        if left < stop:  # each pair once, none of a row with itself
            block.masked_fill_(torch.arange(left, right).unsqueeze(0) <= torch.arange(start, stop).unsqueeze(1), 0.0)
        _note_best(best, units, block, start, left, exact=short is None)
        hit = (block.amax(1) >= least).nonzero().squeeze(1)
        if len(hit):
            rows, columns = _at_most(block[hit], least)
            found.append((hit[rows] + start, columns + left, block[hit[rows], columns]))
    if not found:
        return _nothing()
    rows, columns, cosines = (torch.cat(parts) for parts in zip(*found, strict=True))
    if short is not None:
        cosines = _cosines(units, rows, columns).abs()
    return rows, columns, cosines


def _at_most(block: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Places of entries of at least `least`: all of them, in rows that have few; else the greatest of the row."""
    many = (block >= least).sum(1) > 4 * MOST
    if bool(many.any()):
        width = min(4 * MOST, block.shape[1])
        floor = torch.where(many, block.topk(width, dim=1).values[:, -1], torch.full((len(block),), least))
        kept = block >= floor.clamp_min(least).unsqueeze(1)
        # ties at the floor could be all of the row: count them off
        kept &= kept.cumsum(1) <= torch.where(many, 2 * width, block.shape[1]).unsqueeze(1)
    else:
        kept = block >= least
    rows, columns = kept.nonzero(as_tuple=True)
    return rows, columns


def _nearest(rows: Tensor, columns: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The `MOST` greatest of each row, and how many rows had more."""
    order = torch.sort(cosines, descending=True, stable=True).indices
    order = order[torch.sort(rows[order], stable=True).indices]
    rows, columns, cosines = rows[order], columns[order], cosines[order]
    if not len(rows):
        return rows, columns, cosines, 0
    _, counts = torch.unique_consecutive(rows, return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    kept = torch.arange(len(rows)) - starts < MOST
    return rows[kept], columns[kept], cosines[kept], int((counts > MOST).sum())


def _note_best(best: Tensor, units: Tensor, block: Tensor, start: int, left: int, *, exact: bool) -> None:
    """Raise `best` of the rows and of the columns of a block."""
    for dim, (own, other) in enumerate(((left, start), (start, left))):
        values = block.amax(dim)
        mine = torch.arange(own, own + len(values))
        if not exact:  # the full sketches of the likeliest say how near they are
            hit = (values >= _LIKELY).nonzero().squeeze(1)
            at = block.index_select(1 - dim, hit).argmax(dim)
            mine, values = mine[hit], _cosines(units, mine[hit], at + other).abs()
        best[mine] = torch.maximum(best[mine], values)


def _cosines(units: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    parts = [
        (units[rows[i : i + _GATHERED]] * units[columns[i : i + _GATHERED]]).sum(1)
        for i in range(0, len(rows), _GATHERED)
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def _shortened(units: Tensor) -> Tensor:
    """The same rows in `_SHORT` random directions, of norm 1 again."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(LENGTH, _SHORT, dtype=torch.float64, generator=generator))[0].float()
    return unit(torch.cat([part @ directions for part in units.split(_GATHERED)]))


def correlations(units: Tensor, residuals: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(start, |residuals[start:] @ units^T|) a few residuals at a time."""
    height = max(1, _ROWS * _COLUMNS // max(1, len(units)))
    for start in range(0, len(residuals), height):
        yield start, (residuals[start : start + height] @ units.T).abs_()
