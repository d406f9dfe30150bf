"""Every operator is the matrix it stands for: each law compares structure with a float64 numpy matrix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from loratools.errors import AdapterError
from loratools.linalg.hadamard import Hadamard, hadamard
from loratools.linalg.wavelets import Wavelet
from loratools.operators import (
    MAX_DENSE_ELEMENTS,
    BlockDiagonal,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    Operator,
    Sparse,
    Sum,
    Transform,
    Transformed,
    scattered,
    sum_of,
)


def tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def array(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


Example = tuple[Operator, np.ndarray]


def dense(m: int, n: int, seed: int = 0) -> Example:
    x = tensor(seed, m, n)
    return Dense(x), array(x)


def low(m: int, r: int, n: int, scale: float, seed: int = 0) -> Example:
    left, right = tensor(seed, m, r), tensor(seed + 1, r, n)
    return LowRank(left, right, scale), scale * (array(left) @ array(right))


def block(*parts: Example) -> Example:
    truth = np.zeros((sum(t.shape[0] for _, t in parts), sum(t.shape[1] for _, t in parts)))
    row = column = 0
    for _, t in parts:
        truth[row : row + t.shape[0], column : column + t.shape[1]] = t
        row, column = row + t.shape[0], column + t.shape[1]
    return BlockDiagonal(tuple(op for op, _ in parts)), truth


def diagonal(m: int, n: int, count: int) -> Example:
    values = tensor(7, count)
    truth = np.zeros((m, n))
    truth[range(count), range(count)] = array(values)
    return Diagonal(values, (m, n)), truth


def sparse(m: int, n: int, places: list[int], seed: int = 0) -> Example:
    values = tensor(seed, len(places))
    truth = np.zeros(m * n)
    truth[places] = array(values)
    return Sparse(torch.tensor(places, dtype=torch.int64), values, (m, n)), truth.reshape(m, n)


def total(*parts: Example) -> Example:
    return Sum(tuple(op for op, _ in parts)), np.add.reduce([t for _, t in parts])


def kronecker(left: Example, right: Example, scale: float) -> Example:
    return Kronecker(left[0], right[0], scale), scale * np.kron(left[1], right[1])


def transformed(inner: Example, rows: Transform | None, columns: Transform | None) -> Example:
    """By the matrices of the transforms; those of Hadamard are known apart from their algorithm."""
    sides = []
    for transform, size in zip((rows, columns), inner[0].shape, strict=True):
        if isinstance(transform, Hadamard):
            sides.append(array(hadamard(size)) / size**0.5)
        elif transform is None:
            sides.append(np.eye(size))
        else:
            sides.append(array(transform.analyse(torch.eye(transform.size, dtype=torch.float64))))
    return Transformed(inner[0], rows, columns), sides[0].T @ inner[1] @ sides[1]


EXAMPLES: dict[str, Example] = {
    "transformed": transformed(sparse(5, 7, [0, 3, 9, 10, 34]), Wavelet("db2", 5), Wavelet("db1", 7)),
    "transformed_deep": transformed(dense(5, 3), Wavelet("db2", 10, 2), Wavelet("db1", 6, 2)),
    "transformed_columns": transformed(sparse(5, 12, [1, 7, 40]), None, Hadamard(12)),
    "transformed_rows": transformed(low(8, 2, 3, -0.5), Hadamard(8), None),
    "transformed_and_low": total(transformed(sparse(6, 4, [1, 5]), None, Hadamard(4)), low(6, 2, 4, 0.5)),
    "kronecker": kronecker(dense(2, 3), dense(4, 2, 5), -1.5),
    "kronecker_of_low": kronecker(dense(1, 7), low(5, 2, 1, 0.5), 2.0),
    "kronecker_tall": kronecker(low(3, 1, 2, 1.0), low(2, 1, 4, 1.0, 3), 1.0),
    "diagonal": diagonal(5, 7, 5),
    "diagonal_short": diagonal(6, 4, 2),
    "diagonal_and_low": total(diagonal(6, 4, 3), low(6, 2, 4, 0.5)),
    "sparse": sparse(5, 7, [0, 3, 9, 10, 34]),
    "sparse_unordered": sparse(6, 4, [23, 2, 9]),
    "sparse_empty": sparse(3, 4, []),
    "sparse_and_low": total(sparse(6, 4, [1, 5, 22], 4), low(6, 2, 4, 0.5)),
    "dense": dense(5, 7),
    "dense_row": dense(1, 4),
    "low_rank": low(5, 3, 7, 1.5),
    "low_rank_negative": low(6, 2, 4, -0.25),
    "low_rank_zero_scale": low(6, 2, 4, 0.0),
    "low_rank_wide": low(4, 9, 3, 2.0),
    "low_rank_column": low(8, 2, 1, -3.0),
    "blocks": block(low(3, 2, 4, -0.5), low(3, 2, 4, 2.0, 5)),
    "blocks_uneven": block(low(3, 2, 4, 1.0), dense(1, 2, 3), low(2, 1, 5, -1.0, 9)),
    "blocks_of_sums": block(total(dense(3, 4), low(3, 2, 4, 0.5)), dense(2, 2)),
    "sum": total(dense(5, 7), low(5, 3, 7, -2.0, 4)),
    "sum_of_blocks": total(block(low(2, 1, 3, 1.0), dense(3, 2)), dense(5, 5, 8), low(5, 2, 5, -0.5, 3)),
}
SQUARES = [name for name, (op, _) in EXAMPLES.items() if op.shape == (5, 7)]
each = pytest.mark.parametrize("name", EXAMPLES)


def assert_close(found: torch.Tensor, wanted: np.ndarray, tolerance: float = 1e-13) -> None:
    assert tuple(found.shape) == wanted.shape
    np.testing.assert_allclose(array(found), wanted, rtol=0, atol=tolerance * max(1.0, np.abs(wanted).max()))


def test_the_table_has_every_class() -> None:
    assert {type(op) for op, _ in EXAMPLES.values()} == set(Operator.__subclasses__())


@each
def test_dense_and_shape(name: str) -> None:
    op, truth = EXAMPLES[name]
    assert op.shape == truth.shape
    assert_close(op.dense(), truth)


@each
def test_products(name: str) -> None:
    op, truth = EXAMPLES[name]
    m, n = op.shape
    x, y = tensor(11, n, 3), tensor(12, m, 2)
    assert_close(op.matmat(x), truth @ array(x))
    assert_close(op.rmatmat(y), truth.T @ array(y))


@each
def test_transpose(name: str) -> None:
    op, truth = EXAMPLES[name]
    assert type(op.T) is type(op)
    assert op.T.shape == truth.T.shape
    assert_close(op.T.dense(), truth.T)
    assert_close(op.T.T.dense(), truth)
    assert_close(op.T.matmat(tensor(12, op.shape[0], 2)), truth.T @ array(tensor(12, op.shape[0], 2)))


@each
@pytest.mark.parametrize("factor", [2.0, -0.75, 0.0])
def test_scalar(name: str, factor: float) -> None:
    op, truth = EXAMPLES[name]
    for scaled in (op * factor, factor * op):
        assert scaled.shape == op.shape
        assert_close(scaled.dense(), factor * truth)
        assert_close(scaled.matmat(tensor(1, op.shape[1], 2)), factor * truth @ array(tensor(1, op.shape[1], 2)))
    assert_close((-op).dense(), -truth)
    assert_close(op.dense(), truth)  # the original is as it was


@each
def test_difference_with_itself_is_zero(name: str) -> None:
    op, truth = EXAMPLES[name]
    assert_close((op - op).dense(), 0 * truth, 1e-12)
    assert_close((op + op).dense(), 2 * truth)


@pytest.mark.parametrize("left", SQUARES)
@pytest.mark.parametrize("right", SQUARES)
def test_sum_and_difference(left: str, right: str) -> None:
    (a, ta), (b, tb) = EXAMPLES[left], EXAMPLES[right]
    x = tensor(3, 7, 2)
    for op, truth in ((a + b, ta + tb), (a - b, ta - tb), ((a - b).T, (ta - tb).T)):
        assert op.shape == truth.shape
        assert_close(op.dense(), truth)
    assert_close((a + b).matmat(x), (ta + tb) @ array(x))


@each
def test_cast(name: str) -> None:
    op, truth = EXAMPLES[name]
    single = op.to(torch.float32)
    assert single.leaf.dtype == torch.float32
    assert single.dense().dtype == torch.float32
    assert_close(single.dense(), truth, 1e-5)
    again = single.to(torch.float64, "cpu")
    assert again.leaf.dtype == torch.float64
    assert again.matmat(tensor(1, op.shape[1], 2)).dtype == torch.float64
    assert op.leaf.dtype == torch.float64  # the original is as it was


@each
def test_leaf_is_one_of_its_tensors(name: str) -> None:
    op, _ = EXAMPLES[name]
    assert op.leaf.dtype == torch.float64
    assert op.leaf.device.type == "cpu"


class TestSumOf:
    def test_low_rank_terms_become_one(self) -> None:
        parts = [low(5, r, 7, s, 10 * r) for r, s in ((1, 0.3), (2, -4.0), (3, 1.0))]
        merged = sum_of([op for op, _ in parts])
        assert isinstance(merged, LowRank)
        assert merged.rank == 6
        assert_close(merged.dense(), np.add.reduce([t for _, t in parts]))

    def test_dense_terms_become_one(self) -> None:
        assert isinstance(sum_of([dense(5, 7)[0], dense(5, 7, 2)[0]]), Dense)

    def test_sparse_terms_become_one(self) -> None:
        (a, ta), (b, tb) = sparse(5, 7, [0, 3, 9]), sparse(5, 7, [9, 30, 3, 4], 2)
        merged = sum_of([a, b])
        assert isinstance(merged, Sparse)
        assert merged.places.tolist() == [0, 3, 4, 9, 30]
        assert_close(merged.dense(), ta + tb)

    def test_equal_blocks_are_merged_block_by_block(self) -> None:
        a, ta = EXAMPLES["blocks"]
        merged = sum_of([a, a * -0.5])
        assert isinstance(merged, BlockDiagonal)
        assert all(isinstance(b, LowRank) for b in merged.blocks)
        assert_close(merged.dense(), 0.5 * ta)

    def test_unequal_blocks_stay_a_sum(self) -> None:
        (a, ta), (b, tb) = block(low(2, 1, 3, 1.0), dense(3, 2)), block(dense(3, 2), low(2, 1, 3, 1.0))
        merged = sum_of([a, b, a])
        assert isinstance(merged, Sum)
        assert_close(merged.dense(), 2 * ta + tb)

    def test_nested_sums_are_flattened(self) -> None:
        merged = sum_of([sum_of([dense(5, 7)[0], low(5, 2, 7, 1.0)[0]]), low(5, 1, 7, -1.0, 6)[0]])
        assert isinstance(merged, Sum)
        assert sorted(type(t).__name__ for t in merged.terms) == ["Dense", "LowRank"]
        truth = dense(5, 7)[1] + low(5, 2, 7, 1.0)[1] + low(5, 1, 7, -1.0, 6)[1]
        assert_close(merged.dense(), truth)

    def test_one_term_is_itself(self) -> None:
        op, _ = EXAMPLES["low_rank"]
        assert sum_of([op]) is op

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("scale", [1 / 3, -1.7, 2.0**-20])
    def test_scales_do_not_round_the_factors(self, dtype: torch.dtype, scale: float) -> None:
        """Folding 1/3 into bfloat16 factors would cost 1e-3; the merged sum is exact to float64."""
        factors = [(tensor(s, 6, 2, dtype=dtype), tensor(s + 1, 2, 5, dtype=dtype)) for s in (0, 7)]
        scales = [scale, 1.0]
        merged = sum_of([LowRank(le, ri, s) for (le, ri), s in zip(factors, scales, strict=True)])
        truth = np.add.reduce([s * (array(le) @ array(ri)) for (le, ri), s in zip(factors, scales, strict=True)])
        assert_close(merged.dense(), truth, 1e-14)

    def test_mixed_dtypes_cancel_exactly(self) -> None:
        left, right = tensor(0, 6, 2, dtype=torch.bfloat16), tensor(1, 2, 5, dtype=torch.bfloat16)
        gone = sum_of([LowRank(left, right, 0.1), LowRank(left.double(), right.double(), -0.1)])
        assert_close(gone.dense(), np.zeros((6, 5)), 1e-15)

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(ValueError, match="different shapes"):
            sum_of([dense(5, 7)[0], low(7, 1, 5, 1.0)[0]])
        with pytest.raises(ValueError, match="different shapes"):
            Sum((dense(5, 7)[0], dense(7, 5)[0]))


def test_values_at_one_place_are_added() -> None:
    op = scattered(torch.tensor([7, 0, 7, 11]), torch.tensor([1.0, 2.0, 4.0, -1.0], dtype=torch.float64), (3, 4))
    truth = np.zeros(12)
    truth[[0, 7, 11]] = 2.0, 5.0, -1.0
    assert op.places.tolist() == [0, 7, 11]
    assert_close(op.dense(), truth.reshape(3, 4))


def test_places_and_values_must_match() -> None:
    with pytest.raises(ValueError, match="do not match"):
        Sparse(torch.tensor([1, 2]), torch.zeros(3), (2, 2))


def test_factors_must_chain() -> None:
    for left, right in (
        (tensor(0, 4, 3), tensor(0, 2, 5)),
        (tensor(0, 4), tensor(0, 4, 5)),
        (tensor(0, 4, 1, 1), tensor(0, 1, 5)),
    ):
        with pytest.raises(ValueError, match="do not chain"):
            LowRank(left, right)


def test_coefficients_must_fit_their_transform() -> None:
    with pytest.raises(ValueError, match="8 coefficients of a"):
        Transformed(dense(4, 8)[0], Hadamard(8), None)
    with pytest.raises(ValueError, match="4 coefficients of a"):
        Transformed(dense(4, 8)[0], None, Hadamard(4))


SIDE = 1 << 15  # SIDE * SIDE is four times the limit
THIN = torch.zeros(SIDE, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowRank(THIN, THIN.T),
        lambda: LowRank(THIN, THIN.T).T,
        lambda: BlockDiagonal((LowRank(THIN, THIN.T[:, :9000]), LowRank(THIN[:9000], THIN.T))),
        lambda: Sum((LowRank(THIN, THIN.T), LowRank(THIN, THIN.T))),
        lambda: Dense(torch.zeros(1, 1).expand(SIDE, SIDE)),
        lambda: Sparse(torch.tensor([3]), torch.ones(1), (SIDE, SIDE)),
    ],
    ids=["low_rank", "transposed", "blocks", "sum", "dense", "sparse"],
)
def test_a_huge_dense_matrix_is_refused(make: Callable[[], Operator]) -> None:
    op = make()
    assert op.shape[0] * op.shape[1] > MAX_DENSE_ELEMENTS
    with pytest.raises(AdapterError, match=f"dense {op.shape[0]} x {op.shape[1]} matrix"):
        op.dense()
