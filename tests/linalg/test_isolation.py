"""That a Ritz value stands for one singular value, against the singular values themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratools.linalg.isolation import Ritz, is_isolated, window
from loratools.linalg.krylov import FAILURE, Krylov
from loratools.operators import Dense


def weight(m: int, n: int, spectrum: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    p = min(m, n)
    u = torch.linalg.qr(torch.randn(m, p, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, p, generator=generator, dtype=torch.float64)).Q
    return (u * spectrum) @ v.T


def ritz_of(run: Krylov) -> Ritz:
    return run._ritz()[2]


@pytest.mark.parametrize("seed", range(8))
def test_isolated_means_one_singular_value_in_the_window(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 260 + 20 * seed
    spectrum = torch.rand(n, generator=generator, dtype=torch.float64).sort(descending=True).values
    spectrum[: 6 + seed] += 1.5 * torch.rand(6 + seed, generator=generator, dtype=torch.float64)
    matrix = weight(n + 30, n, spectrum, seed)
    true = np.linalg.svd(matrix.numpy(), compute_uv=False)
    run = Krylov(Dense(matrix), 6, seed=seed)
    proven = 0
    for _ in range(7):
        run._extend()
        ritz = ritz_of(run)
        for j in range(12):
            if is_isolated(ritz, j, columns=n, rounding=1e-12, failure=FAILURE):
                inside = np.abs(true - float(ritz.values[j])) <= window(ritz, j)
                assert inside.sum() == 1, (j, inside.sum())
                proven += 1
    assert proven >= 5


def test_what_has_not_converged_is_not_isolated() -> None:
    run = Krylov(Dense(weight(300, 300, torch.linspace(1, 0.9, 300, dtype=torch.float64), 0)), 5)
    for _ in range(4):
        run._extend()
    assert not any(is_isolated(ritz_of(run), j, columns=300, rounding=1e-12, failure=FAILURE) for j in range(10))


def test_a_slowly_falling_spectrum_is_told_apart() -> None:
    """Where the leading values lie 2 % apart, and no bound on the (i + 1)-th is below the i-th."""
    matrix = weight(600, 600, torch.arange(1, 601, dtype=torch.float64) ** -0.2, 1)
    found = Krylov(Dense(matrix), 6).leading(range(6), 1e-4, proven=True)
    assert float(found.errors[:6].max()) <= 1e-4
    assert found.upper[6] > float(found.s[5])
    u = np.linalg.svd(matrix.numpy())[0]
    cosines = np.abs((found.u[:, :6].numpy() * u[:, :6]).sum(0))
    assert (np.sqrt(2 * (1 - np.minimum(cosines, 1))) <= found.errors[:6].numpy() + 1e-12).all()


def test_rounding_and_failure_count_against_it() -> None:
    run = Krylov(Dense(weight(400, 400, torch.arange(1, 401, dtype=torch.float64) ** -0.5, 2)), 4)
    for _ in range(8):
        run._extend()
    ritz = ritz_of(run)
    assert is_isolated(ritz, 0, columns=400, rounding=1e-12, failure=FAILURE)
    assert not is_isolated(ritz, 0, columns=400, rounding=1.0, failure=FAILURE)
    assert not is_isolated(ritz, 0, columns=400, rounding=1e-12, failure=1e-300)


def test_equal_ritz_values_have_no_window() -> None:
    ritz = Ritz(torch.tensor([1.0, 1.0, 0.5]).double(), torch.ones(8, 3).double(), torch.zeros(3, 8).double(), 1.0)
    assert window(ritz, 0) == 0
    assert not is_isolated(ritz, 0, columns=10, rounding=0.0, failure=FAILURE)
    assert window(ritz, 2) == pytest.approx(0.25)
