"""Inner products, norms and cosines on structure, against the dense float64 matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.linalg.inner import cosine, frobenius, inner, relative_error
from loratools.operators import BlockDiagonal, Dense, LowRank, Operator, Sum


def rand(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low(m: int, r: int, n: int, scale: float, seed: int) -> LowRank:
    return LowRank(rand(seed, m, r), rand(seed + 1, r, n), scale)


OPERATORS: dict[str, Operator] = {
    "low_rank": low(8, 3, 6, -0.5, 0),
    "other_low_rank": low(8, 7, 6, 2.0, 2),
    "bfloat16": LowRank(rand(4, 8, 2, dtype=torch.bfloat16), rand(5, 2, 6, dtype=torch.bfloat16), 1 / 3),
    "dense": Dense(rand(6, 8, 6)),
    "sum": Sum((Dense(rand(7, 8, 6)), low(8, 2, 6, 1.0, 8))),
    "blocks": BlockDiagonal((low(4, 2, 3, 1.0, 10), low(4, 2, 3, -3.0, 12))),
    "other_blocks": BlockDiagonal((low(4, 1, 3, 0.5, 14), Dense(rand(16, 4, 3)))),
    "unequal_blocks": BlockDiagonal((low(2, 1, 4, 1.0, 17), Dense(rand(19, 6, 2)))),
}
each = pytest.mark.parametrize("name", OPERATORS)
other = pytest.mark.parametrize("second", OPERATORS)


def matrix(op: Operator) -> np.ndarray:
    return op.to(torch.float64).dense().numpy()


@other
@each
def test_inner_and_cosine(name: str, second: str) -> None:
    a, b = OPERATORS[name], OPERATORS[second]
    truth = float((matrix(a) * matrix(b)).sum())
    norms = np.linalg.norm(matrix(a)) * np.linalg.norm(matrix(b))
    assert inner(a, b) == pytest.approx(truth, rel=1e-12, abs=1e-12 * norms)
    assert cosine(a, b) == pytest.approx(truth / norms, abs=1e-12)
    assert cosine(a, a * -3.0) == pytest.approx(-1.0, abs=1e-12)


@each
def test_frobenius(name: str) -> None:
    op = OPERATORS[name]
    assert frobenius(op) == pytest.approx(np.linalg.norm(matrix(op)), rel=1e-12)
    assert frobenius(op * -2.0) == pytest.approx(2 * frobenius(op), rel=1e-12)


@other
@each
def test_relative_error(name: str, second: str) -> None:
    a, b = OPERATORS[name], OPERATORS[second]
    truth = np.linalg.norm(matrix(a) - matrix(b)) / np.linalg.norm(matrix(a))
    assert relative_error(a, b) == pytest.approx(truth, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1e-8, 1e-12])
def test_small_differences_of_low_rank_are_resolved(size: float) -> None:
    """Gram matrices would lose everything below 1e-8; QR does not, whatever the gauge."""
    a, change = low(20, 3, 15, 1.0, 0), low(20, 1, 15, size, 5)
    q = rand(9, 3, 3)
    near = LowRank(
        torch.cat([a.left @ q, change.left * size], 1), torch.cat([torch.linalg.inv(q) @ a.right, change.right])
    )
    wanted = np.linalg.norm(matrix(change)) / np.linalg.norm(matrix(a))
    assert relative_error(a, near) == pytest.approx(wanted, rel=max(1e-9, 1e-13 / size))


def test_zero() -> None:
    zero, one = low(8, 3, 6, 0.0, 0), OPERATORS["low_rank"]
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero, one) == math.inf
    assert relative_error(one, zero) == pytest.approx(1.0, rel=1e-12)
    assert inner(zero, one) == 0.0
    assert math.isnan(cosine(zero, one))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        inner(OPERATORS["dense"], OPERATORS["dense"].T)


def test_huge_low_rank_needs_no_dense_matrix() -> None:
    a = LowRank(torch.ones(40_000, 2), torch.ones(2, 40_000), 0.5)
    assert frobenius(a) == pytest.approx(40_000, rel=1e-12)
    assert inner(a, a) == pytest.approx(40_000.0**2, rel=1e-12)
    assert relative_error(a, a * 1.5) == pytest.approx(0.5, rel=1e-9)
