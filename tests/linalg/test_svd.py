"""Spectra and truncations of every structure against numpy's dense SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.errors import AdapterError
from loratools.linalg.svd import Method, blocks_of, spectrum, thin_svd, truncate
from loratools.operators import BlockDiagonal, Dense, LowRank, Operator, Sum


def rand(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low(m: int, r: int, n: int, scale: float = 1.0, seed: int = 0) -> LowRank:
    return LowRank(rand(seed, m, r), rand(seed + 1, r, n), scale)


OPERATORS: dict[str, Operator] = {
    "low_rank": low(9, 4, 7, -0.5),
    "more terms than rows": low(3, 8, 5, 2.0),
    "dense": Dense(rand(2, 6, 8)),
    "wide": Dense(rand(3, 2, 9)),
    "sum": Sum((low(6, 2, 8), Dense(rand(4, 6, 8)))),
    "blocks": BlockDiagonal((low(5, 3, 4, 1.0, 5), low(5, 3, 4, -2.0, 7))),
    "zero": low(9, 4, 7, 0.0),
    "one row": low(1, 4, 7),
    "bfloat16": LowRank(rand(0, 9, 4, dtype=torch.bfloat16), rand(1, 4, 7, dtype=torch.bfloat16), 1 / 3),
}
each = pytest.mark.parametrize("name", OPERATORS)
WHOLE = [name for name, op in OPERATORS.items() if not isinstance(op, BlockDiagonal)]


def matrix(op: Operator) -> np.ndarray:
    return op.to(torch.float64).dense().numpy()


def tail(truth: np.ndarray, rank: int) -> float:
    return float(np.linalg.norm(np.linalg.svd(truth, compute_uv=False)[rank:]))


@each
def test_spectrum(name: str) -> None:
    op = OPERATORS[name]
    found = spectrum(op)
    assert found.dtype == torch.float64
    assert bool((found[:-1] >= found[1:]).all())
    truth = np.linalg.svd(matrix(op), compute_uv=False)
    np.testing.assert_allclose(found.numpy(), truth[: len(found)], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(truth[len(found) :], 0, atol=1e-12)


@each
def test_thin_svd(name: str) -> None:
    op = OPERATORS[name]
    u, s, vt = thin_svd(op)
    k = len(s)
    np.testing.assert_allclose(((u * s) @ vt).numpy(), matrix(op), atol=1e-12)
    np.testing.assert_allclose((u.T @ u).numpy(), np.eye(k), atol=1e-12)
    np.testing.assert_allclose((vt @ vt.T).numpy(), np.eye(k), atol=1e-12)
    np.testing.assert_allclose(s.numpy(), np.linalg.svd(matrix(op), compute_uv=False)[:k], rtol=1e-12, atol=1e-12)
    assert all(column[np.abs(column).argmax()] > 0 for column in u.numpy().T)


@pytest.mark.parametrize("method", ["auto", "exact"])
@each
def test_truncation_is_the_optimum(name: str, method: Method) -> None:
    op = OPERATORS[name]
    blocks = blocks_of(op)
    for rank in range(1, min(blocks[0].shape) + 1):
        found = truncate(op, rank, method=method)
        assert found.complete
        assert len(found.spectra) == len(blocks)
        parts = blocks_of(found.operator)
        for block, part, values in zip(blocks, parts, found.spectra, strict=True):
            assert isinstance(part, LowRank)
            assert part.rank <= rank
            assert part.scale == 1.0
            truth = matrix(block)
            error = float(np.linalg.norm(truth - matrix(part)))
            assert error <= tail(truth, rank) * (1 + 1e-10) + 1e-13
            s = np.linalg.svd(truth, compute_uv=False)
            np.testing.assert_allclose(values.numpy(), s[: len(values)], rtol=1e-10, atol=1e-12)
            for gram in (part.left.T @ part.left, part.right @ part.right.T):  # balanced
                np.testing.assert_allclose(gram.numpy(), np.diag(s[: part.rank]), atol=1e-10)


@pytest.mark.parametrize("name", WHOLE)
def test_methods_agree_to_the_sign(name: str) -> None:
    """One convention for signs, so that the way of computing does not show in the factors."""
    op = OPERATORS[name].to(torch.float64)
    rank = min(2, *op.shape)
    exact, sketched = truncate(op, rank, method="exact"), truncate(op, rank, method="rsvd")
    assert (exact.complete, sketched.complete) == (True, False)
    torch.testing.assert_close(sketched.operator.dense(), exact.operator.dense(), rtol=1e-6, atol=1e-9)
    if name != "zero":
        torch.testing.assert_close(
            blocks_of(sketched.operator)[0].leaf, blocks_of(exact.operator)[0].leaf, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("name", WHOLE)
def test_more_than_the_dimensions_is_refused(name: str) -> None:
    op = OPERATORS[name]
    with pytest.raises(AdapterError, match=f"exceeds the dimensions {op.shape[0]} x {op.shape[1]}"):
        truncate(op, min(op.shape) + 1)


def test_auto_sketches_only_what_is_wide() -> None:
    """Factors never; matrices from 512 a side and far above the rank. The sketch costs 1.6 % on this flat spectrum."""
    s = torch.logspace(0, -2, 600, dtype=torch.float64)
    op = LowRank(torch.linalg.qr(rand(0, 620, 600))[0] * s, torch.linalg.qr(rand(1, 610, 600))[0].T)
    assert truncate(op, 40).complete
    matrix = Dense(op.dense())
    assert truncate(Dense(matrix.matrix[:500]), 4).complete
    assert truncate(matrix, 100).complete
    wide = truncate(matrix, 40)
    assert not wide.complete
    error = float(torch.linalg.matrix_norm(op.dense() - wide.operator.dense()))
    assert float(s[40:].norm()) <= error <= 1.02 * float(s[40:].norm())


def test_huge_low_rank_needs_no_dense_matrix() -> None:
    thin = rand(0, 40_000, 2)
    op = LowRank(thin, thin.T)
    assert spectrum(op).shape == (2,)
    assert truncate(op, 1).operator.shape == (40_000, 40_000)
