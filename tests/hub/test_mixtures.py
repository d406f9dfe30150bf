"""Sums of few rows among many."""

from __future__ import annotations

import pytest
import torch

from loratools.hub.mixtures import mixtures
from loratools.hub.nearest import unit
from loratools.hub.sketches import LENGTH


def rows(count: int = 60) -> torch.Tensor:
    return torch.randn(count, LENGTH, generator=torch.Generator().manual_seed(0))


def told(planted: torch.Tensor, threshold: float = 0.95) -> dict[int, set[int]]:
    found = mixtures(unit(planted), range(len(planted)), threshold)
    return {m.row: set(m.terms) for m in found}


@pytest.mark.parametrize(
    "weights",
    [(0.5, 0.5), (0.9, 0.1), (3.0, 1.0), (0.6, 0.4, 0.5), (1.0, 1.0, 1.0), (0.3, 0.3, 0.3, 0.3), (1.0, 0.5, 0.2)],
)
def test_positive_sums_are_found_and_nothing_else(weights: tuple[float, ...]) -> None:
    planted = rows()
    planted[20] = sum(w * planted[30 + i] for i, w in enumerate(weights))
    assert told(planted) == {20: set(range(30, 30 + len(weights)))}


def test_unrelated_and_nearly_alike_rows_are_no_sums() -> None:
    planted = rows()
    assert told(planted) == {}
    planted[20] = planted[30] + 0.2 * rows(61)[60]
    planted[21] = -2 * planted[31] + 0.01 * rows(62)[61]
    assert told(planted) == {}


def test_a_sum_with_noise_is_one_where_its_terms_matter() -> None:
    planted = rows()
    planted[20] = planted[30] + planted[31] + 0.1 * planted[59]
    planted[59] = rows(63)[62]
    assert told(planted) == {20: {30, 31}}
    assert told(planted, threshold=0.999) == {}


def test_a_difference_is_told_the_other_way_round() -> None:
    planted = rows()
    planted[20] = planted[30] - planted[31]
    assert told(planted) == {30: {20, 31}}


def test_sums_of_the_same_terms_are_told_by_these() -> None:
    planted = rows()
    planted[20] = 0.5 * planted[30] + 0.5 * planted[31]
    planted[21] = 0.6 * planted[30] + 0.4 * planted[31]
    assert told(planted) == {20: {30, 31}, 21: {30, 31}}


def test_only_suspects_are_looked_at() -> None:
    planted = rows()
    planted[20] = planted[30] + planted[31]
    assert mixtures(unit(planted), [1, 2], 0.95) == []
    assert mixtures(unit(planted), [], 0.95) == []
