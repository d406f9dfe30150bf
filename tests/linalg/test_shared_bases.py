"""Bases that deltas share, against dense float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from loratools.linalg.shared_bases import (
    Bases,
    RunningBasis,
    atoms,
    clustered,
    cores,
    diagonals,
    joint,
    left_over,
    seeded,
)


def stack(count: int, p: int, q: int, r: int, seed: int, inner: int = 0) -> tuple[Tensor, Tensor]:
    """Factors of deltas (count, p, q) with orthogonal columns; in common subspaces where `inner` says of what size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, p, r, generator=generator, dtype=torch.float64)
    y = torch.randn(count, q, r, generator=generator, dtype=torch.float64)
    if inner:
        left = torch.randn(p, inner, generator=generator, dtype=torch.float64)
        right = torch.randn(q, inner, generator=generator, dtype=torch.float64)
        x, y = left @ x[:, :inner], right @ y[:, :inner]
    u, s, vt = torch.linalg.svd(x @ y.mT, full_matrices=False)
    root = s[:, :r].sqrt().unsqueeze(1)
    return u[:, :, :r] * root, vt[:, :r].mT * root


def turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """In coordinates whose first ones are the leading vectors of all, as a pack has them."""
    sides = (torch.linalg.svd(torch.cat([*f], dim=1), full_matrices=True)[0] for f in (x, y))
    return tuple(side.T @ f for side, f in zip(sides, (x, y), strict=True))  # type: ignore[return-value]


def halves(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two batches."""
    cut = len(x) // 2
    yield x[:cut], y[:cut]
    yield x[cut:], y[cut:]


def start(p: int, q: int, c: int) -> Bases:
    return Bases(torch.eye(p, c, dtype=torch.float64), torch.eye(q, c, dtype=torch.float64))


def naive_error(deltas: Tensor, c: int, sweeps: int) -> float:
    """Alternating singular value decompositions of stacked dense matrices, from the leading vectors of all."""
    u = torch.linalg.svd(torch.cat([*deltas], dim=1), full_matrices=False)[0][:, :c]
    v = torch.linalg.svd(torch.cat([d.T for d in deltas], dim=1), full_matrices=False)[0][:, :c]
    for _ in range(sweeps):
        u = torch.linalg.svd(torch.cat([d @ v for d in deltas], dim=1), full_matrices=False)[0][:, :c]
        v = torch.linalg.svd(torch.cat([d.T @ u for d in deltas], dim=1), full_matrices=False)[0][:, :c]
    return sum(float((d - u @ (u.T @ d @ v) @ v.T).square().sum()) for d in deltas)


@pytest.mark.parametrize("c", [2, 5])
@pytest.mark.parametrize("inner", [0, 5])
@pytest.mark.parametrize("size", [(12, 9), (40, 36)])  # on either side of where all eigenvectors are had
def test_joint_reaches_what_dense_alternation_reaches(c: int, inner: int, size: tuple[int, int]) -> None:
    x, y = turned(*stack(7, *size, 3, 1, inner))
    deltas = x @ y.mT
    bases, captured = joint(lambda: halves(x, y), start(*size, c), sweeps=200)
    error = sum(float((d - bases.u @ (bases.u.T @ d @ bases.v) @ bases.v.T).square().sum()) for d in deltas)
    total = float(deltas.square().sum())
    assert total - captured[-1] == pytest.approx(error, abs=1e-9 * total)
    assert error <= naive_error(deltas, c, 200) * 1.02 + 1e-9 * total
    for basis in (bases.u, bases.v):
        torch.testing.assert_close(basis.T @ basis, torch.eye(c, dtype=torch.float64))


@pytest.mark.parametrize("size", [(12, 9), (50, 44)])
def test_no_sweep_loses(size: tuple[int, int]) -> None:
    x, y = stack(9, *size, 4, 2)
    _, captured = joint(lambda: halves(x, y), start(*size, 4), sweeps=30)
    assert len(captured) > 2
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(captured))


def test_members_alone_are_fitted() -> None:
    x, y = stack(6, 10, 8, 2, 3)
    chosen = [True, False, True, False, False, True]
    bases, captured = joint(lambda: halves(x, y), start(10, 8, 4), members=chosen, sweeps=100)
    picked = (x @ y.mT)[torch.tensor(chosen)]
    inside = sum(float((bases.u.T @ d @ bases.v).square().sum()) for d in picked)
    assert captured[-1] == pytest.approx(inside)
    assert float(picked.square().sum()) - inside <= naive_error(picked, 4, 100) * 1.02


def test_clusters_are_found() -> None:
    first, second = stack(5, 14, 12, 3, 4, inner=3), stack(5, 14, 12, 3, 5, inner=3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    x, y = (torch.cat(pair)[order] for pair in zip(first, second, strict=True))
    deltas = x @ y.mT
    norms = deltas.flatten(1).norm(dim=1)
    scale = norms.sqrt().reshape(-1, 1, 1)
    x, y = x / scale, y / scale

    def cosines(index: int) -> Tensor:
        flat = (x @ y.mT).flatten(1)
        return flat @ flat[index]

    truth = (order >= 5).long()
    outcomes = []
    for seed in range(8):  # restarts: alternation ends in what no single change betters
        begin = seeded(cosines, 10, 2, seed=seed)
        fits, found, captured = clustered(lambda: halves(x, y), begin, start(14, 12, 3), sweeps=20)
        error = 0.0
        for d, g, share in zip(x @ y.mT, found, captured, strict=True):
            u, v = fits[int(g)].u, fits[int(g)].v
            lost = float((d - u @ (u.T @ d @ v) @ v.T).square().sum())
            assert lost == pytest.approx(1 - float(share), abs=1e-12)
            error += lost
        right = bool((found == truth).all() or (found == 1 - truth).all())
        assert right == (error < 1e-9)
        outcomes.append(right)
    assert any(outcomes)


def test_diagonals_are_the_least_squares() -> None:
    x, y = stack(4, 9, 7, 2, 6)
    generator = torch.Generator().manual_seed(1)
    bases = Bases(*(torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (9, 7)))
    s, captured = diagonals(x, y, bases)
    columns = torch.stack([torch.outer(bases.u[:, k], bases.v[:, k]).flatten() for k in range(3)], dim=1)
    for i, d in enumerate(x @ y.mT):
        best = torch.linalg.lstsq(columns, d.flatten().unsqueeze(1)).solution[:, 0]
        torch.testing.assert_close(s[i], best)
        error = float((d.flatten() - columns @ best).square().sum())
        assert float(d.square().sum()) - float(captured[i]) == pytest.approx(error)


@pytest.mark.parametrize("count", [5, 30])  # fewer and more than c^2
def test_atoms_are_the_best_of_their_number(count: int) -> None:
    x, y = stack(count, 8, 8, 3, 7)
    bases = start(8, 8, 4)
    found = atoms(lambda: halves(x, y), bases, 3, count)
    flat = cores(x, y, bases).flatten(1)
    kept = float((flat @ found.flatten(1).T).square().sum())
    assert kept == pytest.approx(float(torch.linalg.svdvals(flat)[:3].square().sum()))


@pytest.mark.parametrize("orthonormal", [True, False])
def test_what_is_left_over_is_never_overrated_and_nearly_exact(orthonormal: bool) -> None:
    """Of deltas that stick out of the common coordinates too."""
    x, y = stack(5, 20, 18, 4, 8)
    keep = 12  # coordinates of 20 and 18
    generator = torch.Generator().manual_seed(2)
    bases = Bases(*(torch.randn(keep, 3, generator=generator, dtype=torch.float64) for _ in range(2)))
    if orthonormal:
        bases = Bases(torch.linalg.qr(bases.u)[0], torch.linalg.qr(bases.v)[0])
    core = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)
    found = left_over(x[:, :keep], y[:, :keep], (x.mT @ x, y.mT @ y), bases, core, 2)
    for i in range(5):
        known = torch.zeros(20, 18, dtype=torch.float64)
        known[:keep, :keep] = bases.u @ core[i] @ bases.v.T
        true = torch.linalg.svdvals(x[i] @ y[i].T - known)[:2].square()
        assert bool((found[i] <= true * (1 + 1e-9)).all())
        assert float(found[i].sum()) >= 0.95 * float(true.sum())


def test_a_running_basis_spans_what_it_saw() -> None:
    generator = torch.Generator().manual_seed(3)
    columns = (
        torch.randn(30, 8, generator=generator, dtype=torch.float64) @ torch.randn(8, 40, generator=generator).double()
    )
    basis = RunningBasis(30, 10)
    for part in columns.split(3, dim=1):
        basis.append(part)
    vectors = basis.vectors()
    assert vectors.shape == (30, 8)
    torch.testing.assert_close(vectors @ (vectors.T @ columns), columns)
    torch.testing.assert_close(vectors[:, 0].abs(), torch.linalg.svd(columns)[0][:, 0].abs())


def test_a_running_basis_of_nothing() -> None:
    basis = RunningBasis(5, 3)
    basis.append(torch.zeros(5, 2))
    assert basis.vectors().shape == (5, 0)
