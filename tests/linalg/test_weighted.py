"""Weighted factors, against the dense SVD of delta C^(1/2)."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import AdapterError
from loratools.linalg.weighted import weighted_factors

SHAPES = [(12, 5, 9), (5, 4, 30), (3, 6, 20), (20, 8, 6), (7, 1, 7)]  # m, r, n


def problem(m: int, r: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors, and a C whose directions have energies from 1 to 1e-4."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((m, r), (r, n)))
    axes = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    return left, right, (axes * torch.logspace(0, -4, n, dtype=torch.float64)) @ axes.T


def weighted_norm(delta: torch.Tensor, c: torch.Tensor) -> float:
    return float(torch.trace(delta @ c @ delta.T).clamp(min=0).sqrt())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_reaches_the_eckart_young_bound(shape: tuple[int, int, int]) -> None:
    left, right, c = problem(*shape)
    up, down, s = weighted_factors(left, right, right @ c @ right.T)
    delta = left @ right
    values, vectors = torch.linalg.eigh(c)
    expected = torch.linalg.svdvals(delta @ (vectors * values.sqrt()))[: min(shape)]
    torch.testing.assert_close(s, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(up @ down, delta, rtol=1e-9, atol=1e-9)
    for k in range(min(shape)):
        bound = float(expected[k:].square().sum().sqrt())
        assert weighted_norm(delta - up[:, :k] @ down[:k], c) == pytest.approx(bound, rel=1e-7)


def test_equal_inputs_give_the_plain_svd() -> None:
    left, right, _ = problem(12, 5, 9)
    up, down, s = weighted_factors(left, right, right @ right.T)
    torch.testing.assert_close(s, torch.linalg.svdvals(left @ right)[:5])
    torch.testing.assert_close(up.T @ up, torch.diag(s), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(down @ down.T, torch.diag(s), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_the_gauge_of_the_factors_does_not_matter(spread: float) -> None:
    left, right, c = problem(12, 5, 9)
    g = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g = g * torch.logspace(0, float(torch.tensor(spread).log10()), 5, dtype=torch.float64).unsqueeze(1)
    turned = g @ right
    ours = weighted_factors(left, right, right @ c @ right.T)
    theirs = weighted_factors(left @ torch.linalg.inv(g), turned, turned @ c @ turned.T)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_signs_are_decided_by_the_largest_entry() -> None:
    left, right, c = problem(12, 5, 9)
    up, _, _ = weighted_factors(left, right, right @ c @ right.T)
    assert bool((up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all())


def test_directions_that_no_input_had_come_last_and_are_kept_exactly() -> None:
    left, right, _ = problem(12, 5, 9)
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    c = x @ x.T  # of rank 2
    up, down, s = weighted_factors(left, right, right @ c @ right.T)
    torch.testing.assert_close(up @ down, left @ right, rtol=1e-7, atol=1e-7)
    assert float(s[2]) < 1e-3 * float(s[1])
    delta = left @ right
    assert weighted_norm(delta - up[:, :2] @ down[:2], c) < 1e-3 * weighted_norm(delta, c)


def test_dependent_rows_and_no_inputs_at_all() -> None:
    left, right, c = problem(12, 5, 9)
    right = torch.cat([right[:4], right[:1]])
    up, down, s = weighted_factors(left, right, right @ c @ right.T)
    torch.testing.assert_close(up @ down, left @ right, rtol=1e-9, atol=1e-9)
    assert float(s[4]) < 1e-9
    up, down, s = weighted_factors(left, right, torch.zeros(5, 5))
    torch.testing.assert_close(s[:4], torch.linalg.svdvals(left @ right)[:4])


def test_a_zero_update_stays_zero() -> None:
    left, right, c = problem(12, 5, 9)
    up, down, s = weighted_factors(left * 0, right, right @ c @ right.T)
    assert not bool((up @ down).any())
    assert not bool(s.any())
    up, down, s = weighted_factors(left, right * 0, torch.zeros(5, 5))
    assert bool(torch.isfinite(up).all())
    assert not bool((up @ down).any())


def test_a_moment_of_another_rank_is_refused() -> None:
    left, right, _ = problem(12, 5, 9)
    with pytest.raises(AdapterError, match="does not fit factors of rank 5"):
        weighted_factors(left, right, torch.eye(4))
