"""The search for alike sketches, against brute force."""

from __future__ import annotations

import pytest
import torch

from loratools.hub import nearest
from loratools.hub.nearest import MOST, candidates, cut, margin, unit
from loratools.hub.sketches import LENGTH


def planted(count: int, pairs: int, seed: int = 0) -> torch.Tensor:
    """Unrelated rows, and in the last `pairs` ones relatives of the first at cosines from 0.9 to 1, some negated."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, LENGTH, generator=generator)
    near = torch.linspace(0.9, 1, pairs)[:, None]
    rows[-pairs:] = near * rows[:pairs] + (1 - near**2).sqrt() * rows[-pairs:]
    rows[-pairs::3] *= -0.5
    return rows


def brute(rows: torch.Tensor, threshold: float) -> dict[tuple[int, int], float]:
    wide = rows.double()
    wide = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-300)
    cosines = (wide @ wide.T).triu(1)
    return {(i, j): float(cosines[i, j]) for i, j in (cosines.abs() >= threshold).nonzero().tolist()}


def found(rows: torch.Tensor, threshold: float) -> dict[tuple[int, int], float]:
    made = candidates(unit(rows), threshold)
    pairs = zip(made.first.tolist(), made.second.tolist(), strict=True)
    return dict(zip(pairs, made.cosine.tolist(), strict=True))


@pytest.mark.parametrize("shorten", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 0.95, 1.0])
def test_all_pairs_over_the_threshold_are_found(
    monkeypatch: pytest.MonkeyPatch, threshold: float, shorten: bool
) -> None:
    monkeypatch.setattr(nearest, "_SHORTEN_ABOVE", 0 if shorten else 10**9)
    monkeypatch.setattr(nearest, "_ROWS", 64)  # blocks that do not divide the rows
    monkeypatch.setattr(nearest, "_COLUMNS", 150)
    rows = planted(700, 60)
    rows[5] = 0
    truth, have = brute(rows, cut(threshold) + 1e-6), found(rows, threshold)
    assert set(truth) <= set(have)
    assert set(have) <= set(brute(rows, cut(threshold) - 1e-6))
    assert all(abs(have[pair] - truth[pair]) < 1e-5 for pair in truth)
    assert list(map(abs, have.values())) == sorted(map(abs, have.values()), reverse=True)


def test_the_best_of_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = planted(700, 60)
    truth = brute(rows, 0.0)
    best = torch.zeros(700)
    for (i, j), value in truth.items():
        best[i], best[j] = max(best[i], abs(value)), max(best[j], abs(value))
    torch.testing.assert_close(candidates(unit(rows), 0.95).best, best, rtol=0, atol=1e-5)
    monkeypatch.setattr(nearest, "_SHORTEN_ABOVE", 0)
    short = candidates(unit(rows), 0.95).best
    torch.testing.assert_close(short[best > 0.4], best[best > 0.4], rtol=0, atol=1e-5)
    assert bool((short <= best + 1e-5).all())


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1])
def test_many_alike_stay_connected_and_few_pairs(noise: float) -> None:
    """400 relatives of one: each keeps a bounded number of pairs, and a chain of these connects all."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, LENGTH, generator=generator) + noise * torch.randn(400, LENGTH, generator=generator)
    made = candidates(unit(rows), 0.95)
    assert len(made.first) <= 400 * MOST
    assert made.crowded == 400 - MOST - 1
    reached, last = {399}, 0
    links = list(zip(made.first.tolist(), made.second.tolist(), strict=True))
    while len(reached) > last:
        last = len(reached)
        reached |= {i for i, j in links if j in reached} | {j for i, j in links if i in reached}
    assert len(reached) == 400


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_rows(count: int) -> None:
    made = candidates(unit(torch.ones(count, LENGTH)), 0.95)
    assert list(zip(made.first.tolist(), made.second.tolist(), strict=True)) == [(0, 1)] * (count == 2)


def test_the_margin_shrinks_with_the_threshold() -> None:
    assert margin(1.0) == 0
    assert 0 < margin(0.99) < margin(0.9)
    assert cut(0.2) == 0.1
    assert cut(0.95, shortened=True) < cut(0.95) < 0.95
