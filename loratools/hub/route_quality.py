"""How well texts are routed: confusion, calibration, and what wrong choices cost."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import InputError
from loratools.hub.adapter_set import FALLBACK
from loratools.reports.route import Choice, Quality, Regret
from loratools.storage.atomic import printable
from loratools.storage.header import quoted

_BINS = 10


@dataclass(frozen=True)
class Losses:
    """The loss of each adapter in each scenario."""

    where: str
    adapters: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]


def read_losses(path: Path) -> Losses:
    """A CSV file with a row for each scenario and a column for each adapter, the first of which names the scenario.

    InputError names the line that is none; NaN and infinity are no losses.
    """
    name = printable(path)
    try:
        lines = [line for line in csv.reader(path.read_text(encoding="utf-8").splitlines()) if line]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{name}: cannot be read as CSV: {error}") from None
    if len(lines) < 2 or len(lines[0]) < 2:
        raise InputError(f"{name}: needs a line of names, scenario,adapter,..., and one for each scenario")
    adapters = tuple(cell.strip() for cell in lines[0][1:])
    rows: dict[str, tuple[float, ...]] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            values = tuple(float(cell) for cell in line[1:])
        except ValueError:
            raise InputError(f"{name}, row {number}: holds a loss that is no number") from None
        if len(values) != len(adapters) or not all(math.isfinite(value) for value in values):
            raise InputError(f"{name}, row {number}: needs {len(adapters)} finite losses")
        if line[0].strip() in rows:
            raise InputError(f"{name}, row {number}: names the scenario {quoted(line[0].strip(), 80)} again")
        rows[line[0].strip()] = values
    if len(set(adapters)) != len(adapters):
        raise InputError(f"{name}: names an adapter twice")
    return Losses(name, adapters, rows)


def quality(choices: Sequence[Choice], labels: Sequence[str], losses: Losses | None = None) -> Quality:
    """How well `choices` meet `labels`, where "base" is the label of texts that belong to no adapter.

    InputError where losses lack an adapter that is chosen or the scenario of a text.
    """
    own = [(c, label) for c, label in zip(choices, labels, strict=True) if label != FALLBACK]
    others = [c for c, label in zip(choices, labels, strict=True) if label == FALLBACK]
    confusion: dict[str, Counter[str]] = {}
    for choice, label in zip(choices, labels, strict=True):
        confusion.setdefault(label, Counter())[choice.adapter] += 1
    hits = [c.candidates[0].adapter == label for c, label in own]
    confidences = [c.candidates[0].confidence for c, _ in own]
    return Quality(
        len(own),
        _share(hits),
        _share([c.adapter == label for c, label in own]),
        _share([c.adapter == FALLBACK for c, _ in own]),
        len(others),
        _share([c.adapter == FALLBACK for c in others]),
        expected_calibration_error(confidences, hits) if own else None,
        {label: dict(sorted(counts.items())) for label, counts in sorted(confusion.items())},
        None if losses is None else regret(choices, labels, losses),
    )


def expected_calibration_error(confidences: Sequence[float], hits: Sequence[bool], bins: int = _BINS) -> float:
    """sum_b n_b / N |accuracy_b - confidence_b| over `bins` equal bins (l, u], the first closed at 0."""
    found: dict[int, list[tuple[float, bool]]] = {}
    for confidence, hit in zip(confidences, hits, strict=True):
        found.setdefault(max(0, math.ceil(confidence * bins) - 1), []).append((confidence, hit))
    gaps = [abs(math.fsum(h for _, h in group) - math.fsum(c for c, _ in group)) for group in found.values()]
    return math.fsum(gaps) / len(confidences)


def regret(choices: Sequence[Choice], labels: Sequence[str], losses: Losses) -> Regret:
    """The mean of loss(chosen) - min loss; texts labelled "base" count where the losses have such a scenario."""
    at = {adapter: i for i, adapter in enumerate(losses.adapters)}
    pairs = [(c, label) for c, label in zip(choices, labels, strict=True) if label != FALLBACK or label in losses.rows]
    if missing := sorted({label for _, label in pairs} - set(losses.rows)):
        raise InputError(f"{losses.where}: has no row for the scenario {quoted(missing[0], 80)}")
    if missing := sorted({c.adapter for c, _ in pairs} - set(at)):
        raise InputError(f"{losses.where}: has no column for {quoted(missing[0], 80)}, to which texts are routed")
    if not pairs:
        raise InputError(f"{losses.where}: no text has a scenario with losses")
    matrix = {label: tuple(v - min(row) for v in row) for label, row in losses.rows.items()}
    singles = [math.fsum(matrix[label][j] for _, label in pairs) / len(pairs) for j in range(len(at))]
    best = min(range(len(at)), key=singles.__getitem__)
    return Regret(
        math.fsum(matrix[label][at[c.adapter]] for c, label in pairs) / len(pairs),
        len(pairs),
        losses.adapters,
        matrix,
        singles[best],
        losses.adapters[best],
        singles[at[FALLBACK]] if FALLBACK in at else None,
    )


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None
