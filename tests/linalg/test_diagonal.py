"""The best diagonal between two fixed matrices, against least squares on all entries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratools.linalg.diagonal import best_diagonal, projected, solved
from loratools.operators import Dense, LowRank, Operator


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deltas() -> dict[str, Operator]:
    low = LowRank(rand(0, 9, 2), rand(1, 2, 7), -0.5)
    return {"factors": low, "dense": Dense(rand(2, 9, 7)), "sum": Dense(rand(2, 9, 7)) + low}


@pytest.mark.parametrize("kind", ["factors", "dense", "sum"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_it_is_least_squares_on_all_entries(kind: str, k: int) -> None:
    delta, left, right = deltas()[kind], rand(3, 9, k), rand(4, k, 7)
    design = np.stack([np.outer(left[:, j], right[j]).ravel() for j in range(k)], axis=1)
    wanted = np.linalg.lstsq(design, delta.dense().numpy().ravel(), rcond=None)[0]
    np.testing.assert_allclose(best_diagonal(delta, left, right).numpy(), wanted, rtol=1e-7, atol=1e-9)
    sides = [float(left[:, j] @ delta.dense() @ right[j]) for j in range(k)]
    np.testing.assert_allclose(projected(delta, left, right).numpy(), sides, rtol=1e-10)


def test_a_planted_diagonal_is_found() -> None:
    left, right, d = rand(3, 30, 12), rand(4, 12, 20), rand(5, 12)
    found = best_diagonal(LowRank(left * d, right), left, right)
    torch.testing.assert_close(found, d, rtol=1e-9, atol=1e-12)


def test_scales_of_very_different_sizes_do_not_drown() -> None:
    sizes = torch.logspace(-8, 8, 12, dtype=torch.float64)
    left, right, d = rand(3, 30, 12) * sizes, rand(4, 12, 20), rand(5, 12) / sizes
    torch.testing.assert_close(best_diagonal(LowRank(left * d, right), left, right), d, rtol=1e-7, atol=0)


def test_what_the_equations_do_not_see_stays_zero() -> None:
    left, right = rand(3, 9, 4), rand(4, 4, 7)
    left[:, 2] = 0
    found = best_diagonal(Dense(rand(2, 9, 7)), left, right)
    assert found[2] == 0
    assert torch.isfinite(found).all()


def test_more_unknowns_than_entries_solve_it() -> None:
    """Equal columns share the work."""
    left, right = rand(3, 3, 2), rand(4, 2, 3)
    twice = torch.cat([left, left], dim=1), torch.cat([right, right])
    found = best_diagonal(LowRank(left, right), *twice)
    torch.testing.assert_close(found, torch.full((4,), 0.5, dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_batch_is_solved_member_by_member() -> None:
    tall = rand(6, 5, 8, 4)
    gram, sides = tall.mT @ tall, rand(7, 5, 4)
    found = solved(gram, sides)
    for i in range(5):
        torch.testing.assert_close(gram[i] @ found[i], sides[i], rtol=1e-8, atol=1e-9)


def test_several_sides_are_solved_at_once() -> None:
    tall, sides = rand(6, 8, 4), rand(7, 3, 4)
    gram = tall.T @ tall
    torch.testing.assert_close(solved(gram, sides), torch.stack([solved(gram, side) for side in sides]))
