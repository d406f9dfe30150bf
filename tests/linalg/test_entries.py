"""Entries and the largest of them, against the dense matrix, whatever the structure and the size of the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratools.linalg import entries
from loratools.linalg.entries import channel_weights, entries_at, largest, row_blocks, rows_of
from loratools.linalg.inner import frobenius, inner
from loratools.linalg.svd import spectrum
from loratools.operators import Dense, Diagonal, Kronecker, LowRank, Operator, Sparse, Sum, sum_of


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOW = LowRank(rand(0, 12, 3), rand(1, 3, 10), -0.5)
SPARSE = Sparse(torch.tensor([119, 0, 7, 30, 31, 64]), rand(2, 6), (12, 10))
OPERATORS: dict[str, Operator] = {
    "low": LOW,
    "dense": Dense(rand(3, 12, 10)),
    "sparse": SPARSE,
    "low and sparse": Sum((LOW, SPARSE)),
    "kronecker": Kronecker(Dense(rand(4, 3, 5)), Dense(rand(5, 4, 2)), 2.0),
    "diagonal": Diagonal(rand(6, 8), (12, 10)),
}
each = pytest.mark.parametrize("name", OPERATORS)


@each
@pytest.mark.parametrize("chunk", [1, 25, 1 << 21])
def test_rows_and_entries_are_those_of_the_matrix(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "CHUNK", chunk)
    op = OPERATORS[name]
    matrix = op.dense()
    torch.testing.assert_close(torch.cat([rows for _, rows in row_blocks(op, most=chunk)]), matrix)
    torch.testing.assert_close(rows_of(op, 3, 8), matrix[3:8])
    places = torch.tensor([5, 119, 0, 64, 65, 31, 5])
    torch.testing.assert_close(entries_at(op, places), matrix.reshape(-1)[places])


def test_blocks_of_rows_are_multiples() -> None:
    starts = [start for start, _ in row_blocks(LOW, multiple=4, most=50)]
    assert starts == [0, 4, 8]


@each
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 6, 17, 120, 200])
def test_the_largest_are_those_of_a_full_sort(name: str, weighted: bool, count: int) -> None:
    op, weights = OPERATORS[name], rand(7, 10).abs() + 0.1 if weighted else None
    matrix = op.dense().numpy()
    sizes = np.abs(matrix) * (1.0 if weights is None else weights.numpy())
    wanted = np.sort(np.argsort(-sizes.reshape(-1), kind="stable")[:count])
    for most in (1 << 21, 30):
        places, values = _largest(op, count, weights, most)
        assert places.tolist() == wanted.tolist()
        np.testing.assert_allclose(values.numpy(), matrix.reshape(-1)[wanted], rtol=1e-12, atol=1e-14)


def _largest(op: Operator, count: int, weights: torch.Tensor | None, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries.row_blocks, "__kwdefaults__", {"multiple": 1, "most": most})
        return largest(op, count, weights)


def test_of_equals_the_first_count() -> None:
    op = Dense(torch.tensor([[1.0, -2.0, 2.0], [2.0, 0.0, -2.0]]))
    assert largest(op, 3)[0].tolist() == [1, 2, 3]
    assert largest(Dense(torch.zeros(3, 4)), 2)[0].tolist() == [0, 1]


def test_no_channel_weighs_nothing() -> None:
    weights = channel_weights(torch.tensor([0.0, 4.0, 1.0]))
    assert weights is not None
    assert weights.tolist() == pytest.approx([(1e-8 * 5 / 3) ** 0.5, 2.0, 1.0])
    assert channel_weights(None) is None
    assert channel_weights(torch.zeros(3)) is None


@pytest.mark.parametrize("other", ["low", "dense", "sparse", "low and sparse", "kronecker"])
def test_inner_products_with_sparse_ones(other: str) -> None:
    op = OPERATORS[other]
    wanted = float((SPARSE.dense() * op.dense()).sum())
    assert inner(SPARSE, op) == pytest.approx(wanted, rel=1e-12)
    assert inner(op, SPARSE) == pytest.approx(wanted, rel=1e-12)


def test_norms_of_low_rank_less_its_own_entries() -> None:
    """Also where nothing, or next to nothing, is left."""
    for count in (1, 30, 119, 120):
        places, values = largest(LOW, count)
        op = sum_of([LOW, -Sparse(places, values, LOW.shape)])
        wanted = LOW.dense().reshape(-1)
        wanted[places] -= values
        assert frobenius(op) == pytest.approx(float(wanted.norm()), rel=1e-9, abs=1e-12)


def test_the_spectrum_of_sparse_ones() -> None:
    wanted = torch.linalg.svdvals(SPARSE.dense())
    torch.testing.assert_close(spectrum(SPARSE), wanted, rtol=1e-12, atol=1e-12)
    assert spectrum(Sparse(torch.empty(0, dtype=torch.int64), rand(0, 0), (3, 5))).tolist() == [0.0] * 3
