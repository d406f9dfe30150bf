"""Leading triplets by products, and what is proven of them, against dense float64 SVDs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loratools.linalg.krylov import FAILURE, Krylov, Leading, _shortfall, leading_triplets
from loratools.operators import Dense, Diagonal, LowRank, sum_of

SPECTRA = {
    "outliers": lambda p: torch.cat([torch.linspace(4, 2, 12), torch.linspace(1, 0.1, p - 12)]),
    "power": lambda p: torch.arange(1, p + 1).double() ** -0.7,
    "flat": lambda p: torch.linspace(1, 0.99, p),
    "low rank": lambda p: torch.cat([torch.linspace(3, 1, 5), torch.zeros(p - 5)]),
    "zero": torch.zeros,
    "plateau": lambda p: torch.cat([torch.tensor([1, 0.9, 0.8, 0.7]), torch.full((p - 4,), 0.5)]),
    "equal": torch.ones,
    "pairs": lambda p: torch.linspace(2, 0.1, p // 2).repeat_interleave(2)[:p],
}


def matrix(m: int, n: int, spectrum: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    p = min(m, n)
    u = torch.linalg.qr(torch.randn(m, p, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, p, generator=generator, dtype=torch.float64)).Q
    return (u * SPECTRA[spectrum](p)) @ v.T


def truth(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(weight.double().numpy(), full_matrices=False)


def distances(found: torch.Tensor, true: np.ndarray) -> np.ndarray:
    """Of each column from the true one of its index, whatever its sign."""
    mine = found.double().numpy()
    signs = np.sign((mine * true).sum(0))
    return np.linalg.norm(mine - true * np.where(signs == 0, 1, signs), axis=0)


def assert_what_is_proven_holds(found: Leading, weight: torch.Tensor) -> None:
    u, s, vt = truth(weight)
    k = len(found.s)
    eps = torch.finfo(weight.dtype).eps
    rounding = 16 * eps * s[0]
    assert (found.s.numpy() <= s[:k] + rounding).all()
    assert len(found.upper) == k + 1
    padded = np.append(s, 0.0)
    assert (np.array(found.upper) >= padded[: k + 1] - rounding).all()
    assert (found.errors[: k - 1] > 0).all()
    for i in range(k):
        if math.isfinite(found.errors[i]):
            allowed = float(found.errors[i]) + 1e4 * np.finfo(float).eps  # of the reference, where gaps are narrow
            assert distances(found.u[:, i : i + 1], u[:, i : i + 1])[0] <= allowed, i
            assert distances(found.vt[i : i + 1].T, vt[i : i + 1].T)[0] <= allowed, i


LEAST = {"outliers": 24, "low rank": 5, "pairs": 5, "plateau": 5}  # singular values that a spectrum takes
CASES = [
    (spectrum, m, n)
    for spectrum in SPECTRA
    for m, n in ((300, 400), (700, 200), (20, 30), (130, 3), (1, 40))
    if min(m, n) >= LEAST.get(spectrum, 1)
]


@pytest.mark.parametrize(("spectrum", "m", "n"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_hold(spectrum: str, m: int, n: int, dtype: torch.dtype) -> None:
    weight = matrix(m, n, spectrum).to(dtype)
    assert_what_is_proven_holds(leading_triplets(Dense(weight), 10), weight)


@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold_at_every_block_and_for_any_seed(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    fall = 0.2 + 2 * torch.rand(1, generator=generator).item()
    m, n = (int(x) for x in torch.randint(150, 300, (2,), generator=generator))
    u, _, vt = torch.linalg.svd(torch.randn(m, n, generator=generator, dtype=torch.float64), full_matrices=False)
    weight = (u * torch.exp(-fall * torch.linspace(0, 3, min(m, n)))) @ vt
    run = Krylov(Dense(weight), 6, seed=seed)
    for wanted in ((0,), (0, 1, 2), range(6)):
        assert_what_is_proven_holds(run.leading(wanted, 1e-4, proven=True), weight)


def test_separated_triplets_are_found_to_the_tolerance() -> None:
    weight = matrix(500, 450, "outliers")
    found = leading_triplets(Dense(weight), 10, tolerance=1e-6)
    assert float(found.errors[:10].max()) <= 1e-6
    np.testing.assert_allclose(found.s[:10].numpy(), truth(weight)[1][:10], rtol=1e-12)


def test_equal_singular_values_have_no_vectors_of_their_own() -> None:
    assert torch.isinf(leading_triplets(Dense(matrix(300, 300, "pairs")), 10).errors).all()


def test_a_start_near_the_truth_saves_products() -> None:
    weight = matrix(600, 600, "power")
    products = []

    def counted(op: Dense) -> int:
        before = len(products)
        run = Krylov(op, 10, start=start)
        run.leading(range(10), 1e-6, proven=False)
        products.append(run._steps)
        return products[before]

    vt = torch.from_numpy(truth(weight)[2])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(600, 16, generator=generator, dtype=torch.float64)
    start = torch.randn(600, 32, generator=generator, dtype=torch.float64)
    far = counted(Dense(weight))
    start = torch.cat([vt[:16].T, noise], dim=1)
    assert counted(Dense(weight)) < far


def test_nothing_is_proven_of_a_chosen_start() -> None:
    weight = matrix(400, 400, "power")
    run = Krylov(Dense(weight), 5, start=torch.eye(400, 20, dtype=torch.float64))
    with pytest.raises(ValueError, match="nothing is proven"):
        run.leading(range(5), 1e-3, proven=True)


def test_structure_is_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.linspace(5, 0.1, 300, dtype=torch.float64)
    low = LowRank(
        torch.randn(310, 3, generator=generator, dtype=torch.float64),
        torch.randn(3, 300, generator=generator, dtype=torch.float64),
    )
    op = sum_of([Diagonal(values, (310, 300)), low])
    found = leading_triplets(op, 3, tolerance=1e-8)
    np.testing.assert_allclose(found.s[:3].numpy(), np.linalg.svd(op.dense().numpy(), compute_uv=False)[:3], rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", ["outliers", "power", "flat", "low rank", "zero", "pairs", "plateau", "equal"])
def test_bases_stay_orthonormal_to_the_end(spectrum: str, dtype: torch.dtype) -> None:
    """And no Ritz value exceeds the singular value of its index, where the Krylov space is exhausted long before."""
    weight = matrix(320, 300, spectrum).to(dtype)
    run = Krylov(Dense(weight), 6)
    while run._steps < run._limit:
        run._extend()
    eps = torch.finfo(dtype).eps
    for basis in (run._u, run._v):
        gram = basis.double().T @ basis.double()
        assert float((gram - torch.eye(len(gram))).abs().max()) < 64 * eps
    found = run.leading(range(6), 0.0, proven=True)
    assert_what_is_proven_holds(found, weight)


def test_the_same_seed_gives_the_same_bytes() -> None:
    op = Dense(matrix(300, 260, "power").float())
    one, two = (leading_triplets(op, 8, seed=3) for _ in range(2))
    assert torch.equal(one.u, two.u)
    assert torch.equal(one.vt, two.vt)
    assert one.upper == two.upper


@pytest.mark.parametrize(("index", "block", "steps"), [(1, 32, 4), (11, 32, 8), (24, 32, 12), (20, 32, 30)])
def test_the_shortfall_solves_its_equation(index: int, block: int, steps: int) -> None:
    e = _shortfall(index, block, steps, 4096)
    spare, half = block - index, FAILURE / 2
    inside = math.e * math.sqrt(block) / (spare + 1) * half ** (-1 / (spare + 1))
    outside = math.sqrt(4096) + math.sqrt(block) + math.sqrt(-2 * math.log(half))
    chebyshev = math.cosh((steps - 1) * math.acosh((1 + e) / (1 - e)))
    assert chebyshev == pytest.approx(math.sqrt((1 - e) / e) * inside * outside, rel=1e-6)


def test_no_ceiling_without_columns_or_blocks_to_spare() -> None:
    assert _shortfall(30, 32, 10, 500) == 1.0
    assert _shortfall(3, 32, 1, 500) == 1.0
