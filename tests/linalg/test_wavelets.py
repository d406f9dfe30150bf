"""Wavelet transforms against PyWavelets where it has them, and against their matrices everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch

from loratools.errors import AdapterError, UsageError
from loratools.linalg.wavelets import (
    Wavelet,
    bands_of,
    coefficients,
    decomposed,
    filters,
    halved,
    joined,
    split,
    spread,
)
from loratools.operators import Dense, LowRank

NAMES = ["db1", "db2", "db3", "sym5", "coif1", "db10"]
each = pytest.mark.parametrize("name", NAMES)
sizes = pytest.mark.parametrize("size", [2, 3, 6, 7, 16, 34, 37, 96])


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(size: int, name: str) -> np.ndarray:
    """One level as a matrix, tap by tap: approximations, the odd one out, details."""
    low, high = (np.array(taps) for taps in (pywt.Wavelet(name).dec_lo, pywt.Wavelet(name).dec_hi))
    half, length = size // 2, len(low)
    whole = np.zeros((size, size))
    for k in range(half):
        for j in range(length):
            place = (2 * k + length // 2 - j) % (2 * half)
            whole[k, place] += low[j]
            whole[size - half + k, place] += high[j]
    if size % 2:
        whole[half, size - 1] = 1
    return whole


@each
@pytest.mark.parametrize("size", [2, 6, 16, 34, 96])
def test_even_sizes_are_those_of_pywavelets(name: str, size: int) -> None:
    x = rand(size, 3)
    wanted = pywt.dwt(x.numpy(), name, mode="periodization", axis=0)
    for found, truth in zip(split(x, name), wanted, strict=True):
        np.testing.assert_allclose(found.numpy(), truth, atol=1e-12)


@each
@sizes
def test_any_size_is_orthogonal(name: str, size: int) -> None:
    t, x = matrix(size, name), rand(size, 2)
    np.testing.assert_allclose(t @ t.T, np.eye(size), atol=1e-9)
    near, far = split(x, name)
    assert (len(near), len(far)) == halved(size)
    np.testing.assert_allclose(torch.cat([near, far]).numpy(), t @ x.numpy(), atol=1e-12)
    np.testing.assert_allclose(joined(near, far, name).numpy(), x.numpy(), atol=1e-9)
    np.testing.assert_allclose(
        joined(far.new_zeros(near.shape), far, name).numpy(), t[len(near) :].T @ far.numpy(), atol=1e-12
    )


@each
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("size", [16, 37])
def test_deeper_levels_are_isometries(name: str, level: int, size: int) -> None:
    transform, whole = Wavelet(name, size, level), np.eye(size)
    for _ in range(level):
        count = len(whole)
        whole = matrix(count, name) @ whole
        near = halved(count)[0]
        whole, last = whole[:near], whole
    assert transform.count == len(last)
    x, c = rand(size, 2), rand(len(last), 2)
    np.testing.assert_allclose(transform.analyse(x).numpy(), last @ x.numpy(), atol=1e-12)
    np.testing.assert_allclose(transform.synthesise(c).numpy(), last.T @ c.numpy(), atol=1e-12)
    np.testing.assert_allclose(last @ last.T, np.eye(len(last)), atol=1e-9)


@each
@pytest.mark.filterwarnings("ignore:Level value:UserWarning")  # filters that are longer than what they work on
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_bands_lie_where_pywavelets_puts_them(name: str, levels: int) -> None:
    x = rand(24, 40)
    truth = pywt.coeffs_to_array(pywt.wavedec2(x.numpy(), name, mode="periodization", level=levels))[0]
    np.testing.assert_allclose(decomposed(x, name, levels).numpy(), truth, atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 40), (17, 30), (31, 9)])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_bands_of_factors_are_those_of_their_product(shape: tuple[int, int], levels: int) -> None:
    op = LowRank(rand(shape[0], 3), rand(3, shape[1], seed=1), -0.5)
    whole = decomposed(op.dense(), "db2", levels)
    seen = torch.zeros(shape, dtype=torch.int64)
    norm = 0.0
    for (band, low), (_, dense) in zip(
        coefficients(op, "db2", levels), coefficients(Dense(op.dense()), "db2", levels), strict=True
    ):
        assert isinstance(low, LowRank)
        assert low.shape == band.shape
        torch.testing.assert_close(low.dense(), whole[band.rows, band.columns])
        torch.testing.assert_close(dense.dense(), whole[band.rows, band.columns])
        seen[band.rows, band.columns] += 1
        norm += float(low.dense().square().sum())
        left = spread(low.left, shape[0], "db2", band.level, details=band.details[0])
        assert float(left.square().sum()) == pytest.approx(float(low.left.square().sum()))
    assert bool((seen == 1).all())
    assert norm == pytest.approx(float(op.dense().square().sum()))


def test_more_levels_than_there_are() -> None:
    assert len(bands_of((4, 8), 2)) == 7
    with pytest.raises(AdapterError, match="has 2 levels of wavelets, not 3"):
        bands_of((4, 8), 3)


@pytest.mark.parametrize("name", ["bior2.2", "rbio1.3", "dmey", "mexh", "nonsense"])
def test_wavelets_that_are_not_orthogonal_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no orthogonal one; there are: coif1, "):
        filters(name)


@each
@pytest.mark.parametrize("shape", [(32, 64), (96, 32), (64, 96)])
@pytest.mark.filterwarnings("ignore:Level value:UserWarning")
def test_matrices_of_whole_blocks(name: str, shape: tuple[int, int]) -> None:
    """Which go through the one pass over both sides."""
    x = rand(*shape)
    for levels in (1, 2):
        truth = pywt.coeffs_to_array(pywt.wavedec2(x.numpy(), name, mode="periodization", level=levels))[0]
        np.testing.assert_allclose(decomposed(x, name, levels).numpy(), truth, atol=1e-12)
        turned = pywt.coeffs_to_array(pywt.wavedec2(x.numpy().T, name, mode="periodization", level=levels))[0]
        np.testing.assert_allclose(decomposed(x.T, name, levels).numpy(), turned, atol=1e-12)
    assert decomposed(x.float(), name, 1).dtype == torch.float32
