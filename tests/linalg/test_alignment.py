"""Maps between the coordinates of two matrices, where what they should be is known."""

from __future__ import annotations

import pytest
import torch

from loratools.linalg.alignment import (
    Isometry,
    agreement,
    between_bases,
    carried,
    held_out_cosine,
    procrustes,
    projections,
)
from loratools.linalg.basis import decomposed
from loratools.operators import LowRank


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(size: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(randn(size, columns, seed=seed))[0]


def low_rank(m: int, n: int, r: int, seed: int = 0) -> LowRank:
    return LowRank(randn(m, r, seed=seed), randn(r, n, seed=seed + 1), 0.5)


def test_a_rotation_is_found_from_rows_that_span_the_space() -> None:
    x, turn = randn(50, 12), orthonormal(12, 12, seed=1)
    found = procrustes(x, x @ turn.T)
    assert found.left @ found.right.T == pytest.approx(turn.numpy(), abs=1e-10)
    assert held_out_cosine(x, x @ turn.T) == pytest.approx(1.0)
    assert held_out_cosine(x, 3 * x @ turn.T) == pytest.approx(1.0)  # size does not count
    assert held_out_cosine(x, randn(50, 12, seed=9)) < 0.2
    assert held_out_cosine(x[:12], x[:12] @ turn.T) < 0.9  # half of so few do not show every direction


@pytest.mark.parametrize(("wide", "narrow"), [(12, 7), (7, 12)])
def test_maps_between_widths_are_the_best_orthonormal_ones(wide: int, narrow: int) -> None:
    x, y = randn(40, wide), randn(40, narrow, seed=3)
    found = procrustes(x, y)
    matrix = found.left @ found.right.T  # (narrow, wide)
    u, _, vt = torch.linalg.svd(y.T @ x, full_matrices=False)
    torch.testing.assert_close(matrix, u @ vt)
    for seed in range(10):  # no other is nearer
        rival = orthonormal(max(wide, narrow), min(wide, narrow), seed=100 + seed)
        rival = rival if rival.shape == matrix.shape else rival.T
        assert ((y.T @ x) * matrix).sum() > ((y.T @ x) * rival).sum()


def test_fewer_rows_than_channels_map_their_span_and_no_more() -> None:
    x, turn = randn(5, 30), orthonormal(30, 30, seed=2)
    found = procrustes(x, x @ turn.T)
    assert found.left.shape == (30, 5)
    torch.testing.assert_close(found(x.T), turn @ x.T)
    outside = randn(30, 1, seed=4)
    outside -= torch.linalg.qr(x.T)[0] @ (torch.linalg.qr(x.T)[0].T @ outside)
    assert float(found(outside).norm()) < 1e-10
    direct = torch.linalg.svd((x @ turn.T).T @ x)
    torch.testing.assert_close(found.left @ found.right.T, direct.U[:, :5] @ direct.Vh[:5])


def test_rows_of_zeros_map_nothing() -> None:
    assert procrustes(torch.zeros(8, 4), torch.zeros(8, 3)).left.shape == (3, 0)
    assert held_out_cosine(torch.zeros(8, 4), torch.zeros(8, 3)) == 0.0
    assert held_out_cosine(torch.ones(1, 4), torch.ones(1, 3)) == 0.0


@pytest.mark.parametrize("shape", [(20, 20), (24, 16), (16, 24)])
def test_a_permuted_weight_carries_the_permuted_delta(shape: tuple[int, int]) -> None:
    m, n = shape
    weight = randn(m, n)
    rows, columns = (torch.randperm(k, generator=torch.Generator().manual_seed(k)) for k in shape)
    one, other = decomposed(weight), decomposed(weight[rows][:, columns])
    change = low_rank(m, n, 3)
    inside = LowRank(one.u @ (one.u.T @ change.left), (change.right @ one.vt.T) @ one.vt, change.scale)
    moved = carried(inside, *between_bases(one, other))
    expected = (inside.left @ inside.right * inside.scale)[rows][:, columns]
    torch.testing.assert_close(moved.left @ moved.right * moved.scale, expected, atol=1e-9, rtol=0)


def test_signs_of_an_svd_do_not_matter() -> None:
    weight, near = randn(18, 12), randn(18, 12) + 0.02 * randn(18, 12, seed=7)
    one, other = decomposed(weight), decomposed(near)
    flips = torch.where(torch.arange(12) % 3 == 0, -1.0, 1.0).double()
    flipped = type(other)(other.u * flips, other.s, flips.unsqueeze(1) * other.vt)
    change = low_rank(18, 12, 2)
    a, b = (carried(change, *between_bases(one, basis)) for basis in (other, flipped))
    torch.testing.assert_close(a.left @ a.right, b.left @ b.right)


@pytest.mark.parametrize(("before", "after"), [((20, 12), (30, 18)), ((30, 18), (20, 12)), ((16, 16), (9, 40))])
def test_other_widths_keep_the_common_coordinates(before: tuple[int, int], after: tuple[int, int]) -> None:
    one, other = decomposed(randn(*before)), decomposed(randn(*after, seed=5))
    change = low_rank(*before, 2)
    moved = carried(change, *between_bases(one, other))
    assert moved.shape == after
    assert moved.rank == 2
    p = min(len(one.s), len(other.s))
    core = one.u[:, :p].T @ change.left @ change.right @ one.vt[:p].T
    there = other.u[:, :p].T @ moved.left @ moved.right @ other.vt[:p].T
    torch.testing.assert_close(there.abs(), core.abs())
    torch.testing.assert_close(torch.linalg.matrix_norm(moved.left @ moved.right), torch.linalg.matrix_norm(core))


def test_agreement_is_of_one_ancestor_and_not_of_chance() -> None:
    weight = randn(64, 64) @ torch.diag(torch.logspace(0, -2, 64).double()) @ orthonormal(64, 64, seed=3)
    one = decomposed(weight)
    assert agreement(one, one) == pytest.approx(1.0)
    assert (agreement(one, decomposed(weight + 1e-3 * randn(64, 64, seed=8))) or 0) > 0.9
    chance = agreement(one, decomposed(randn(64, 64, seed=9)))
    assert chance is not None
    assert chance < 0.15
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    half = agreement(one, decomposed(weight[rows]))  # the inputs are the same, the outputs are not
    assert half is not None
    assert half < 0.15
    assert agreement(one, decomposed(randn(64, 32))) is None


def test_projections_keep_what_the_weight_reaches() -> None:
    basis = decomposed(randn(10, 4))
    outputs, inputs = projections(basis)
    torch.testing.assert_close(outputs(basis.u), basis.u)
    assert float((outputs(randn(10, 3)) - basis.u @ (basis.u.T @ randn(10, 3))).norm()) < 1e-12
    torch.testing.assert_close(inputs(randn(4, 2)), randn(4, 2))


def test_the_map_is_applied_in_its_own_precision() -> None:
    turn = Isometry(orthonormal(6, 6), torch.eye(6, dtype=torch.float64))
    assert turn(torch.ones(6, 1, dtype=torch.float16)).dtype == torch.float64
