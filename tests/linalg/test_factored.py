"""The factored SVD against numpy's SVD of the dense float64 product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.linalg.factored import (
    balanced_factors,
    column_signs,
    factored,
    fits_single,
    is_finite,
    singular_values,
    squared_distance,
)

F64 = np.ndarray


def orthonormal(rng: np.random.Generator, n: int, k: int) -> F64:
    return np.linalg.qr(rng.standard_normal((n, k)))[0]


def with_spectrum(m: int, n: int, s: F64, gauge: float, seed: int) -> tuple[F64, F64]:
    """Factors of a delta of spectrum `s`, mixed by a random gauge: left Q and Q^-1 right, with cond(Q) = `gauge`."""
    rng, r = np.random.default_rng(seed), len(s)
    root = np.sqrt(s)
    u, v = orthonormal(rng, r, r), orthonormal(rng, r, r)
    q = np.logspace(-0.5, 0.5, r) ** np.log10(gauge)
    left = (orthonormal(rng, m, r) * root) @ (u * q) @ v
    right = v.T @ (u / q).T @ (root[:, None] * orthonormal(rng, n, r).T)
    return left, right


def batch(*pairs: tuple[F64, F64], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    left = torch.stack([torch.from_numpy(np.ascontiguousarray(le)) for le, _ in pairs]).to(dtype)
    return left, torch.stack([torch.from_numpy(np.ascontiguousarray(ri)) for _, ri in pairs]).to(dtype)


def product(left: Tensor, right: Tensor) -> F64:
    """Dense truth of one member, from the factors as stored."""
    return left.double().numpy() @ right.double().numpy()


def error_of(left: Tensor, right: Tensor, truth: F64) -> float:
    """||truth - left right|| in float64."""
    return float(np.linalg.norm(truth - product(left, right)))


def optimum_and_floor(truth: F64, rank: int) -> tuple[float, float]:
    """The Eckart-Young error, and what rounding the exact balanced factors to float32 costs by itself."""
    u, s, vt = np.linalg.svd(truth, full_matrices=False)
    up, down = u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * vt[:rank]
    rounded = up.astype(np.float32).astype(np.float64) @ down.astype(np.float32).astype(np.float64)
    return float(np.linalg.norm(s[rank:])), float(np.linalg.norm(rounded - up @ down))


@pytest.mark.parametrize("gauge", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize(("m", "n", "r"), [(40, 30, 8), (24, 64, 16), (17, 9, 9)])
def test_float32_results_are_within_a_hundredth_of_a_percent_of_the_optimum(
    m: int, n: int, r: int, condition: float, gauge: float
) -> None:
    """For every rank, factors read as float32 and results stored as float32.

    Where the tail is below about 1e-5 of the delta, storage in float32 alone costs more than 0.01 % of the optimum,
    whoever computes it: there the bound is the optimum and that rounding (at most doubled, for it is random) together.
    """
    left, right = batch(with_spectrum(m, n, np.logspace(0, -np.log10(condition), r), gauge, 7), dtype=torch.float32)
    truth = product(left[0], right[0])
    for rank in range(1, r):
        best = balanced_factors(factored(left, right), rank)
        error = error_of(best.up[0].float(), best.down[0].float(), truth)
        optimum, floor = optimum_and_floor(truth, rank)
        assert error <= 1.0001 * np.hypot(optimum, 2 * floor)
        if floor < 5e-3 * optimum:  # then the rounding adds less than 0.005 %
            assert error <= 1.0001 * optimum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gauge", [1.0, 1e2, 1e6])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_single_precision_is_enough_for_factors_of_16_bits(condition: float, gauge: float, dtype: torch.dtype) -> None:
    """Sums in float32 show neither in the optimum, before it is rounded to 16 bits, nor in what is reported of it."""
    left, right = batch(with_spectrum(40, 30, np.logspace(0, -np.log10(condition), 8), gauge, 7), dtype=dtype)
    f, truth = factored(left, right, single=True), product(left[0], right[0])
    assert f.is_single
    s = np.linalg.svd(truth, compute_uv=False)
    for rank in range(1, 8):
        best = balanced_factors(f, rank)
        error, optimum = error_of(best.up[0], best.down[0], truth), float(np.linalg.norm(s[rank:]))
        assert error <= 1.0001 * np.hypot(optimum, 1e-6 * s[0])  # a thousandth of what rounding to 16 bits costs
        np.testing.assert_allclose(best.spectrum[0].numpy(), s[:8], rtol=0, atol=1e-4 * s[0])
        up, down = best.up.to(dtype), best.down.to(dtype)
        distance, norm = squared_distance(f, up, down)
        assert float(distance[0]) == pytest.approx(error_of(up[0], down[0], truth) ** 2, rel=1e-3)
        assert float(norm[0]) == pytest.approx((s**2).sum(), rel=1e-4)


def test_what_float32_cannot_square_does_not_fit() -> None:
    left, right = batch(SPECIAL["zero left"], dtype=torch.bfloat16)
    for size, fits in ((1.0, True), (0.0, True), (1e-12, True), (1e-22, False), (1e19, False), (float("nan"), False)):
        assert fits_single(factored(left, size * right, single=True)) == fits


@pytest.mark.parametrize("gauge", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("condition", [1.0, 1e6])
def test_spectra(condition: float, gauge: float) -> None:
    left, right = batch(with_spectrum(40, 30, 3.0 * np.logspace(0, -np.log10(condition), 12), gauge, 3))
    truth = np.linalg.svd(product(left[0], right[0]), compute_uv=False)[:12]
    for found in (singular_values(factored(left, right)), balanced_factors(factored(left, right), 5).spectrum):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found[0].numpy(), truth, rtol=1e-8, atol=1e-13 * truth[0] * gauge)


def special() -> dict[str, tuple[F64, F64]]:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((12, 4)), rng.standard_normal((4, 10))
    dead, twice, scaled = left.copy(), left.copy(), left * np.array([1e6, 1.0, 1e-6, 1e3])
    dead[:, 2] = 0
    twice[:, 3] = twice[:, 0]
    nearly = twice.copy()
    nearly[:, 3] += 1e-7 * rng.standard_normal(12)
    return {
        "zero column": (dead, right),
        "duplicate columns": (twice, right),
        "nearly duplicate columns": (nearly, right),
        "duplicate rows": (left, np.concatenate([right[:3], right[:1]])),
        "columns of all sizes": (scaled, right),
        "zero left": (0 * left, right),
        "zero right": (left, 0 * right),
        "both zero": (0 * left, 0 * right),
        "rank one": (np.outer(left[:, 0], right[:, 0]), np.outer(right[:, 0], right[0])),
        "tiny": (1e-18 * left, 1e-18 * right),
        "huge": (1e18 * left, 1e18 * right),
        "more terms than rows": (rng.standard_normal((3, 8)), rng.standard_normal((8, 10))),
        "more terms than columns": (rng.standard_normal((12, 8)), rng.standard_normal((8, 2))),
        "more terms than both": (rng.standard_normal((3, 8)), rng.standard_normal((8, 2))),
        "one row": (rng.standard_normal((1, 4)), right),
        "one column": (left, rng.standard_normal((4, 1))),
        "one by one": (rng.standard_normal((1, 4)), rng.standard_normal((4, 1))),
        "one term": (left[:, :1], right[:1]),
    }


SPECIAL = special()


def assert_best(left: Tensor, right: Tensor, up: Tensor, down: Tensor, spectrum: Tensor) -> None:
    """All that is promised of one member: the optimum, its spectrum, balance and signs."""
    truth, rank = product(left, right), up.shape[1]
    s = np.linalg.svd(truth, compute_uv=False)
    scale = float(np.linalg.norm(left.numpy()) * np.linalg.norm(right.numpy()))
    assert all(bool(torch.isfinite(x).all()) for x in (up, down, spectrum))
    count = min(*truth.shape, left.shape[1])
    assert spectrum.shape == (count,)
    np.testing.assert_allclose(spectrum.numpy(), s[:count], rtol=1e-9, atol=1e-14 * scale)
    assert error_of(up, down, truth) <= np.linalg.norm(s[rank:]) * (1 + 1e-9) + 1e-13 * scale
    gram = np.diag(s[:rank])
    np.testing.assert_allclose((up.T @ up).numpy(), gram, rtol=1e-7, atol=1e-10 * scale)
    np.testing.assert_allclose((down @ down.T).numpy(), gram, rtol=1e-7, atol=1e-10 * scale)
    for column in up.numpy().T:
        assert column[np.abs(column).argmax()] >= 0


@pytest.mark.parametrize("name", SPECIAL)
def test_deficient_and_extreme_factors(name: str) -> None:
    left, right = batch(SPECIAL[name])
    f = factored(left, right)
    for rank in range(1, min(*left.shape[1:], right.shape[2]) + 1):
        best = balanced_factors(f, rank)
        assert_best(left[0], right[0], best.up[0], best.down[0], best.spectrum[0])
        np.testing.assert_allclose(
            singular_values(f).numpy(), best.spectrum.numpy(), rtol=1e-9, atol=1e-9 * best.spectrum.max()
        )


@pytest.mark.parametrize(
    "names", [("duplicate columns", "rank", "zero left", "zero column"), ("rank", "both zero"), ("rank",)]
)
def test_a_batch_is_its_members(names: tuple[str, ...]) -> None:
    """Sound members keep to the fast way and unsound ones to the slow one, each as if it were alone."""
    rng = np.random.default_rng(5)
    table = SPECIAL | {"rank": (rng.standard_normal((12, 4)), rng.standard_normal((4, 10)))}
    left, right = batch(*(table[name] for name in names))
    together, values = balanced_factors(factored(left, right), 3), singular_values(factored(left, right))
    for i in range(len(names)):
        alone = balanced_factors(factored(left[i : i + 1], right[i : i + 1]), 3)
        assert_best(left[i], right[i], together.up[i], together.down[i], together.spectrum[i])
        assert torch.equal(together.up[i], alone.up[0])
        assert torch.equal(together.down[i], alone.down[0])
        np.testing.assert_allclose(values[i].numpy(), alone.spectrum[0].numpy(), atol=1e-12)


def test_the_same_bytes_every_time_and_on_any_number_of_threads() -> None:
    pairs = [with_spectrum(96, 80, np.logspace(0, -2, 16), 10.0, seed) for seed in range(3)] + [
        (np.ones((96, 16)), np.ones((16, 80)))
    ]
    left, right = batch(*pairs, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 2, 1):
            torch.set_num_threads(count)
            best = balanced_factors(factored(left, right), 6)
            found.append((best.up.float().numpy().tobytes(), best.down.float().numpy().tobytes()))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[3]
    assert found[1] == found[2]
    assert found[0] == found[1]


def test_signs() -> None:
    u = torch.tensor([[1.0, -3.0, 0.0, -2.0], [-2.0, 1.0, 0.0, 2.0]])
    assert column_signs(u).tolist() == [
        [-1.0, -1.0, 1.0, -1.0]
    ]  # of two equal ones the first decides; +1 for a zero column
    assert column_signs(u.expand(2, 2, 4)).shape == (2, 1, 4)
    left, right = batch(with_spectrum(9, 7, np.array([3.0, 2.0, 1.0]), 1.0, 0))
    plus, minus = balanced_factors(factored(left, right), 3), balanced_factors(factored(-left, -right), 3)
    torch.testing.assert_close(plus.up, minus.up)
    torch.testing.assert_close(plus.down, minus.down)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_members_are_found(bad: float, side: int) -> None:
    left, right = batch(*[SPECIAL["columns of all sizes"]] * 3, dtype=torch.float32)
    (left, right)[side][1, 2, 1] = bad
    assert is_finite(factored(left, right)).tolist() == [True, False, True]


@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 9), n=st.integers(1, 9), r=st.integers(1, 9), data=st.data())
def test_any_shape(seed: int, m: int, n: int, r: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    left, right = batch((rng.standard_normal((m, r)), rng.standard_normal((r, n))))
    best = balanced_factors(factored(left, right), data.draw(st.integers(1, min(m, n, r))))
    assert_best(left[0], right[0], best.up[0], best.down[0], best.spectrum[0])


class TestSquaredDistance:
    @pytest.mark.parametrize("gauge", [1.0, 1e3, 1e6])
    @pytest.mark.parametrize("tail", [0.5, 1e-3, 1e-6])
    def test_is_that_of_the_dense_matrices(self, tail: float, gauge: float) -> None:
        """Down to a squared distance of 1e-12 of the norm, however badly the factors are scaled."""
        left, right = batch(with_spectrum(40, 30, np.array([1.0, 0.7, 0.5, tail, tail / 2]), gauge, 1))
        best = balanced_factors(factored(left, right), 3)
        distance, norm = squared_distance(factored(left, right), best.up, best.down)
        truth = product(left[0], right[0])
        assert float(norm[0]) == pytest.approx(np.linalg.norm(truth) ** 2, rel=1e-7)
        assert float(distance[0]) == pytest.approx(error_of(best.up[0], best.down[0], truth) ** 2, rel=1e-3)

    def test_of_equal_matrices_is_rounding(self) -> None:
        left, right = batch(with_spectrum(20, 30, np.array([2.0, 1.0]), 1.0, 2))
        distance, _ = squared_distance(factored(left, right), 2 * left, right / 2)
        assert 0 <= float(distance[0]) < 1e-28

    @pytest.mark.parametrize("name", ["zero left", "both zero"])
    def test_from_zero(self, name: str) -> None:
        left, right = batch(SPECIAL[name])
        distance, norm = squared_distance(factored(left, right), torch.zeros(1, 12, 1), torch.zeros(1, 1, 10))
        assert (float(distance[0]), float(norm[0])) == (0.0, 0.0)
