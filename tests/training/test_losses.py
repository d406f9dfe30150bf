"""Losses, against loops over single tokens in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from loratools.training.losses import cross_entropy, divergence, shared_starts, sorted_distance, token_starts


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp((x - max(row)) / temperature) for x in row]
    return [p / sum(powers) for p in powers]


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits, wanted words, weights."""
    generator = torch.Generator().manual_seed(3)
    student = 3 * torch.randn(5, 7, generator=generator)
    teacher = 3 * torch.randn(5, 7, generator=generator)
    return student, teacher, torch.tensor([0, 6, 3, 3, 1]), torch.tensor([1.0, 0.5, 2.0, 0.25, 1.5])


def weighted_mean(values: list[float], weights: torch.Tensor) -> float:
    return sum(v * w for v, w in zip(values, weights.tolist(), strict=True)) / sum(weights.tolist())


def test_cross_entropy(rows: tuple[torch.Tensor, ...]) -> None:
    student, _, wanted, weights = rows
    values = [-math.log(softmax(row)[w]) for row, w in zip(student.tolist(), wanted.tolist(), strict=True)]
    assert float(cross_entropy(student, wanted, weights)) == pytest.approx(weighted_mean(values, weights), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_divergence(rows: tuple[torch.Tensor, ...], temperature: float) -> None:
    student, teacher, _, weights = rows
    values = []
    for said, meant in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(meant, temperature), softmax(said, temperature)
        values.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    found = float(divergence(student, teacher, weights, temperature))
    assert found == pytest.approx(weighted_mean(values, weights), rel=1e-4)
    assert float(divergence(student, student, weights, temperature)) == pytest.approx(0, abs=1e-6)


def test_sorted_distance_of_vocabularies_of_other_sizes(rows: tuple[torch.Tensor, ...]) -> None:
    student, teacher, _, weights = rows
    teacher = torch.cat([teacher, teacher[:, :2] - 1], 1)
    values = []
    for said, meant in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = [*sorted(softmax(said), reverse=True), 0.0, 0.0], sorted(softmax(meant), reverse=True)
        values.append(sum(abs(a - b) for a, b in zip(p, q, strict=True)))
    found = float(sorted_distance(student, teacher, weights))
    assert found == pytest.approx(weighted_mean(values, weights), rel=1e-5)
    shuffled = student[:, torch.randperm(7)]
    assert float(sorted_distance(student, shuffled, weights)) == pytest.approx(0, abs=1e-6)


def test_tokens_are_paired_where_they_begin_together() -> None:
    """Of " ab cd": " a|b| cd|end" and " ab| c|d|end"."""
    pieces = {0: " a", 1: "b", 2: " cd", 3: " ab", 4: " c", 5: "d"}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(pieces[i] for i in ids))
    mine, theirs = token_starts(tokenizer, [0, 1, 2], " ab cd"), token_starts(tokenizer, [3, 4, 5], " ab cd")
    assert mine == [0, 2, 3, 6]
    assert theirs == [0, 3, 5, 6]
    assert shared_starts(mine, theirs) == [(0, 0), (2, 1), (3, 3)]
    stripped = SimpleNamespace(decode=lambda ids, **_: "".join(pieces[i] for i in ids).lstrip())
    assert token_starts(stripped, [0, 1, 2], " ab cd") == mine
    assert token_starts(tokenizer, [0, 2], " ab cd") == [0, 2, None]
