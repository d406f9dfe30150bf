"""Errors as inputs see them, against the whole matrix C where it is known."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import AdapterError
from loratools.linalg.input_norm import InputNorm
from loratools.operators import Dense, LowRank


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known(m: int = 30, n: int = 20, r: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """left (m, r), down (r, n) and C (n, n) of inputs that are far from uncorrelated."""
    x = noise(200, n, seed=1) @ (noise(n, n, seed=2) * torch.logspace(0, -2, n, dtype=torch.float64))
    return noise(m, r, seed=3), noise(r, n, seed=4), x.T @ x / len(x)


def naive(delta: torch.Tensor, down: torch.Tensor, c: torch.Tensor) -> float:
    """The definition with every matrix in full."""
    p = torch.linalg.pinv(down) @ down
    q = torch.eye(len(c), dtype=c.dtype) - p
    model = p @ c @ p + q @ torch.diag(c.diagonal()) @ q
    return float((delta @ model @ delta.T).trace())


def test_within_the_rows_of_the_factor_it_is_the_norm_of_all_of_c() -> None:
    left, down, c = known()
    norm = InputNorm.of(down, down @ c @ down.T, c.diagonal())
    for scale in (1.0, -0.5):
        delta = scale * left @ down
        truth = float((delta @ c @ delta.T).trace())
        assert norm.squared(LowRank(left, down, scale)) == pytest.approx(truth, rel=1e-10)
        assert norm.squared(Dense(delta)) == pytest.approx(truth, rel=1e-10)


def test_outside_of_them_channels_count() -> None:
    left, down, c = known()
    norm = InputNorm.of(down, down @ c @ down.T, c.diagonal())
    other, rows = noise(30, 6, seed=5), noise(6, 20, seed=6)
    expected = naive(other @ rows, down, c)
    assert norm.squared(LowRank(other, rows)) == pytest.approx(expected, rel=1e-10)
    both = LowRank(torch.cat([left, -other], 1), torch.cat([down, rows]))
    assert norm.squared(both) == pytest.approx(naive(left @ down - other @ rows, down, c), rel=1e-10)


def test_a_small_difference_is_not_lost_in_what_cancels() -> None:
    left, down, c = known()
    norm = InputNorm.of(down, down @ c @ down.T, c.diagonal())
    off = 1e-7 * noise(*left.shape, seed=7)
    difference = LowRank(torch.cat([left, -(left + off)], 1), torch.cat([down, down]))
    assert norm.squared(difference) == pytest.approx(naive(off @ down, down, c), rel=1e-5)


def test_dependent_rows_and_a_wide_factor_are_fine() -> None:
    left, down, c = known()
    twice = torch.cat([down, down])
    norm = InputNorm.of(twice, twice @ c @ twice.T, c.diagonal())
    delta = left @ down
    assert norm.basis.shape == (20, 4)
    assert norm.squared(Dense(delta)) == pytest.approx(float((delta @ c @ delta.T).trace()), rel=1e-8)


def test_statistics_of_other_shapes_are_refused() -> None:
    _, down, c = known()
    with pytest.raises(AdapterError, match=r"shape \(3, 3\) and 20 channels do not fit a factor of shape \(4, 20\)"):
        InputNorm.of(down, c[:3, :3], c.diagonal())
