"""Hadamard matrices of every known length, and the fast transforms by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratools.errors import AdapterError
from loratools.linalg.hadamard import CORES, Hadamard, core, core_of, hadamard, walsh_hadamard

SIZES = [1, 2, 4, 32, 128, *CORES, 24, 56, 80, 12 * 64, 2048]
each = pytest.mark.parametrize("n", SIZES)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@each
def test_rows_are_orthogonal_and_entries_are_signs(n: int) -> None:
    h = hadamard(n).numpy()
    assert set(np.unique(h)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n))


@pytest.mark.parametrize("n", [8, 24, 80])
def test_the_whole_is_the_core_times_sylvester_in_natural_order(n: int) -> None:
    k = core_of(n)
    signs = [[(-1) ** bin(i & j).count("1") for j in range(n // k)] for i in range(n // k)]
    np.testing.assert_array_equal(hadamard(n).numpy(), np.kron(core(k).numpy(), np.array(signs, dtype=float)))


@pytest.mark.parametrize("k", [12, 20, 60])
def test_paley_cores_by_their_definition(k: int) -> None:
    q = k - 1
    squares = {i * i % q for i in range(1, q)}
    chi = [0 if i == 0 else 1 if i in squares else -1 for i in range(q)]
    wanted = np.ones((k, k))
    wanted[0, 1:] = -1
    for i in range(q):
        for j in range(q):
            wanted[i + 1, j + 1] = 1 if i == j else -chi[(j - i) % q]
    np.testing.assert_array_equal(core(k).numpy(), wanted)


def test_the_core_is_the_first_that_leaves_a_power_of_two() -> None:
    sizes = {4096: 1, 3072: 12, 11008: 172, 14336: 28, 13824: 108, 5120: 40, 9984: 156}
    assert {n: core_of(n) for n in sizes} == sizes


@pytest.mark.parametrize("n", [0, 3, 11, 100, 84])
def test_other_lengths_are_refused(n: int) -> None:
    with pytest.raises(AdapterError, match=f"no Hadamard matrix of {n} rows"):
        walsh_hadamard(torch.zeros(2, n))


@each
def test_the_fast_transforms_are_products(n: int) -> None:
    x, h = rand(3, n), hadamard(n)
    torch.testing.assert_close(walsh_hadamard(x), x @ h.T)
    torch.testing.assert_close(walsh_hadamard(x, transposed=True), x @ h)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x), transposed=True), n * x)


@pytest.mark.parametrize("rows", [1, 65, 130])
def test_rows_beyond_one_chunk(rows: int) -> None:
    x = rand(rows, 4096).float()
    out = torch.empty_like(x)
    assert walsh_hadamard(x, out=out) is out
    torch.testing.assert_close(out, (x.double() @ hadamard(4096).T).float(), rtol=1e-4, atol=1e-3)


def test_columns_that_are_not_contiguous() -> None:
    x = rand(64, 5)
    torch.testing.assert_close(walsh_hadamard(x.T), x.T @ hadamard(64).T)


@each
def test_the_transform_of_columns_is_orthogonal(n: int) -> None:
    transform, x = Hadamard(n), rand(n, 2)
    torch.testing.assert_close(transform.analyse(x), hadamard(n) @ x / n**0.5)
    torch.testing.assert_close(transform.synthesise(transform.analyse(x)), x)
