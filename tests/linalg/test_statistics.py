"""Numbers of a spectrum, against matrices and by hand, and the overlap of subspaces."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.linalg.norms import effective_rank, energy, frobenius_norm, nuclear_norm, spectral_norm, stable_rank
from loratools.linalg.subspace import overlap, principal_cosines

spectra = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20).map(lambda values: sorted(values, reverse=True))


def test_norms_are_those_of_the_matrix() -> None:
    a = np.random.default_rng(0).standard_normal((9, 6))
    s = np.linalg.svd(a, compute_uv=False).tolist()
    assert frobenius_norm(s) == pytest.approx(np.linalg.norm(a), rel=1e-12)
    assert spectral_norm(s) == pytest.approx(np.linalg.norm(a, 2), rel=1e-12)
    assert nuclear_norm(s) == pytest.approx(np.linalg.norm(a, "nuc"), rel=1e-12)
    assert stable_rank(s) == pytest.approx((np.linalg.norm(a) / np.linalg.norm(a, 2)) ** 2, rel=1e-12)


def test_by_hand() -> None:
    assert effective_rank([1.0, 1.0, 1.0, 1.0]) == pytest.approx(4.0, rel=1e-12)
    assert effective_rank([2.0, 1.0, 1.0]) == pytest.approx(2**1.5, rel=1e-12)  # entropy 3/2 bits
    assert effective_rank([5.0, 0.0]) == pytest.approx(1.0, rel=1e-12)
    assert stable_rank([2.0, 1.0, 1.0]) == pytest.approx(1.5, rel=1e-12)
    assert [energy([2.0, 1.0], k) for k in (0, 1, 2, 9)] == pytest.approx([0.0, 0.8, 1.0, 1.0], rel=1e-12)


def test_zero_and_empty() -> None:
    for s in ([], [0.0, 0.0]):
        assert frobenius_norm(s) == spectral_norm(s) == nuclear_norm(s) == 0.0
        assert effective_rank(s) == stable_rank(s) == 0.0
        assert energy(s, 1) == 1.0


@pytest.mark.parametrize("scale", [1e-170, 1e-30, 1e30, 1e170])
def test_squares_neither_overflow_nor_vanish(scale: float) -> None:
    s = [2 * scale, scale, scale]
    assert stable_rank(s) == pytest.approx(1.5, rel=1e-12)
    assert energy(s, 1) == pytest.approx(2 / 3, rel=1e-12)
    assert frobenius_norm(s) == pytest.approx(math.sqrt(6) * scale, rel=1e-12)
    assert effective_rank(s) == pytest.approx(2**1.5, rel=1e-12)


@given(spectra)
def test_order_of_the_numbers(s: list[float]) -> None:
    slack = 1 + 1e-9
    assert stable_rank(s) * slack >= 1
    assert stable_rank(s) <= len(s) * slack
    assert effective_rank(s) * slack >= 1
    assert effective_rank(s) <= len(s) * slack
    assert spectral_norm(s) <= frobenius_norm(s) * slack
    assert frobenius_norm(s) <= nuclear_norm(s) * slack
    shares = [energy(s, k) for k in range(len(s) + 1)]
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert shares == sorted(shares)
    truth = [sum(v * v for v in s[:k]) / sum(v * v for v in s) for k in range(len(s) + 1)]
    assert shares == pytest.approx(truth, abs=1e-12)


def basis(seed: int, n: int, k: int) -> torch.Tensor:
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(x)[0]


def test_overlap_of_known_angles() -> None:
    a = torch.eye(5, dtype=torch.float64)[:, :2]
    b = torch.zeros(5, 2, dtype=torch.float64)
    angle = math.radians(30)
    b[0, 0] = 1.0
    b[1, 1], b[2, 1] = math.cos(angle), math.sin(angle)
    assert principal_cosines(a, b).tolist() == pytest.approx([1.0, math.cos(angle)], rel=1e-12)
    assert overlap(a, b) == pytest.approx((1 + 0.75) / 2, rel=1e-12)


def test_overlap_of_projections() -> None:
    """Against the projectors: trace(P_a P_b) over the smaller dimension, whatever the bases."""
    a, b = basis(0, 30, 4), basis(1, 30, 7)
    pa, pb = (a @ a.T).numpy(), (b @ b.T).numpy()
    assert overlap(a, b) == pytest.approx(np.trace(pa @ pb) / 4, rel=1e-12)
    assert overlap(b, a) == pytest.approx(overlap(a, b), rel=1e-12)
    assert overlap(a @ basis(2, 4, 4), b) == pytest.approx(overlap(a, b), rel=1e-12)
    cosines = principal_cosines(a, b)
    assert float(cosines.square().mean()) == pytest.approx(overlap(a, b), rel=1e-12)
    np.testing.assert_allclose(cosines.numpy(), np.sqrt(np.linalg.eigvalsh(pa @ pb @ pa)[::-1][:4]), rtol=1e-9)


def test_overlap_of_contained_orthogonal_and_empty() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    assert overlap(eye[:, :2], eye[:, :5]) == 1.0
    assert principal_cosines(eye[:, :2], eye[:, :5]).max() <= 1.0
    assert overlap(eye[:, :2], eye[:, 2:4]) == 0.0
    assert overlap(eye[:, :0], eye[:, :3]) == 0.0
