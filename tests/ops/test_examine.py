"""Verdicts by bounds and by the whole basis of W0, against float64 SVDs of W0 and of W0 + delta."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from loratools.cache import Cache
from loratools.operators import Dense, LowRank, Operator, sum_of
from loratools.ops.base_spectra import BaseSpectrum, Method, Search
from loratools.ops.examine import Examined, examine

SIZES = ((160, 160), (150, 240), (240, 150), (300, 180), (170, 420))


def base_weight(m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """Outliers on a falling bulk, as trained weights have."""
    p = min(m, n)
    u = torch.linalg.qr(torch.randn(m, p, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(n, p, generator=generator)).Q
    falls = 1 + 2 * torch.rand(1, generator=generator)
    outliers = torch.linspace(3, 1.2, 14) * (torch.arange(p)[:14] < p)
    return (u * torch.cat([outliers, torch.exp(-falls * torch.linspace(0, 1, p - 14))])) @ v.T


def low_rank(m: int, n: int, strength: float, generator: torch.Generator) -> LowRank:
    rank = int(torch.randint(1, 17, (1,), generator=generator))
    left = torch.linalg.qr(torch.randn(m, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q
    return LowRank(left * torch.logspace(0, -1, rank), right.T, strength)


def naive(weight: torch.Tensor, change: Operator, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cosines of the left and right vectors with all of W0, and the singular values."""
    w, d = weight.double().numpy(), change.to(torch.float64).dense().numpy()
    u0, _, v0 = np.linalg.svd(w, full_matrices=False)
    u, s, v = np.linalg.svd(w + d, full_matrices=False)
    return np.abs(u[:, :k].T @ u0), np.abs(v[:k] @ v0.T), s[:k]


def assert_agrees(
    found: Examined, weight: torch.Tensor, change: Operator, thresholds: tuple[float, ...], k: int
) -> None:
    left, right, s = naive(weight, change, k)
    np.testing.assert_allclose(found.values.numpy(), s, rtol=2e-4)
    gaps = np.abs(np.diff(s, append=0)) / s
    for side, cosines in ((found.left, left), (found.right, right)):
        true = cosines.max(1)
        assert (side.most.numpy() >= true - 2e-3).all()
        assert (side.least.numpy() <= true + 2e-3).all()
        for t in thresholds:
            clear = np.abs(true - t) > 1e-4
            assert clear.all(), "choose another seed: this one has a vector right at the threshold"
            assert ((side.most.numpy() < t) == (true < t)).all()
            assert ((side.least.numpy() >= t) == (true >= t)).all()
        turned = np.minimum(gaps, np.roll(gaps, 1)) > 1e-3
        np.testing.assert_allclose(side.matched.numpy()[turned], np.diagonal(cosines)[turned], atol=5e-3)


@pytest.mark.parametrize("method", ["certified", "dense", "auto"])
@pytest.mark.parametrize("seed", range(20))
def test_every_verdict_is_that_of_dense_svds(method: Method, seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    m, n = SIZES[seed % len(SIZES)]
    weight = base_weight(m, n, generator)
    for strength in (0.3, 1.5, 3.0, 6.0):
        change = low_rank(m, n, strength, generator)
        found = examine(BaseSpectrum("w", weight, Search(method)), change, top_k=10, thresholds=(0.5,))
        assert_agrees(found, weight, change, (0.5,), 10)
        assert method != "dense" or found.verdict == "dense"


def test_bounds_decide_most_of_what_they_are_asked() -> None:
    certified = total = 0
    for m, n in ((512, 512), (480, 640), (640, 480)):
        for strength in (0.3, 2.5, 8.0):
            generator = torch.Generator().manual_seed(m + int(strength))
            for _ in range(2):
                weight, change = base_weight(m, n, generator), low_rank(m, n, strength, generator)
                found = examine(BaseSpectrum("w", weight, Search("certified")), change, top_k=5, thresholds=(0.5,))
                assert_agrees(found, weight, change, (0.5,), 5)
                certified, total = certified + (found.verdict == "certified"), total + 1
    assert certified >= 0.75 * total


def test_all_thresholds_of_a_sweep_are_decided() -> None:
    generator = torch.Generator().manual_seed(7)
    weight, change = base_weight(200, 200, generator), low_rank(200, 200, 3.0, generator)
    thresholds = (0.2, 0.4, 0.6, 0.8)
    assert_agrees(
        examine(BaseSpectrum("w", weight, Search("certified")), change, top_k=8, thresholds=thresholds),
        weight,
        change,
        thresholds,
        8,
    )


@pytest.mark.parametrize("method", ["certified", "dense"])
def test_a_dense_change_and_a_sum(method: Method) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = base_weight(170, 150, generator)
    noise = Dense(0.05 * torch.randn(170, 150, generator=generator))
    for change in (noise, sum_of([noise, low_rank(170, 150, 4.0, generator)])):
        found = examine(BaseSpectrum("w", weight, Search(method)), change, top_k=6, thresholds=(0.5,))
        assert_agrees(found, weight, change, (0.5,), 6)


def test_vectors_where_they_are_asked_for() -> None:
    generator = torch.Generator().manual_seed(5)
    weight, change = base_weight(190, 300, generator), low_rank(190, 300, 3.0, generator)
    found = examine(BaseSpectrum("w", weight), change, top_k=6, thresholds=(0.5,), vectors=True)
    assert found.up is not None
    assert found.down is not None
    whole = weight.double() + change.to(torch.float64).dense()
    np.testing.assert_allclose((whole @ found.down.T).numpy(), (found.up * found.values).numpy(), atol=2e-4)
    assert examine(BaseSpectrum("w", weight), change, top_k=6, thresholds=(0.5,)).up is None


def test_a_rank_deficient_base_has_no_square_factor_and_the_right_answer() -> None:
    generator = torch.Generator().manual_seed(11)
    weight = base_weight(300, 150, generator)
    weight[:, 100:] = 0
    change = low_rank(300, 150, 4.0, generator)
    base = BaseSpectrum("w", weight, Search("certified"))
    assert base.square_factor(left=True) is None
    assert_agrees(examine(base, change, top_k=5, thresholds=(0.5,)), weight, change, (0.5,), 5)


def test_nothing_changed_and_nothing_there() -> None:
    weight = base_weight(160, 160, torch.Generator().manual_seed(0))
    nothing = LowRank(torch.zeros(160, 2), torch.zeros(2, 160))
    methods: tuple[Method, ...] = ("certified", "dense")
    for method in methods:
        found = examine(BaseSpectrum("w", weight, Search(method)), nothing, top_k=10, thresholds=(0.5,))
        assert float(found.left.least.min()) > 0.99
        empty = BaseSpectrum("w", torch.zeros(160, 160), Search(method))
        assert torch.isfinite(examine(empty, nothing, top_k=3, thresholds=(0.5,)).values).all()


def test_the_basis_is_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, change = base_weight(200, 160, generator), low_rank(200, 160, 3.0, generator)
    cache = Cache(tmp_path)
    first = examine(BaseSpectrum("w", weight, Search(cache=cache)), change, top_k=5, thresholds=(0.5,))
    (entry,) = cache.entries()
    assert entry.name == "w"
    monkeypatch.setattr("loratools.ops.base_spectra.decomposed", lambda _: pytest.fail("was decomposed again"))
    again = examine(BaseSpectrum("w", weight, Search(cache=cache)), change, top_k=5, thresholds=(0.5,))
    np.testing.assert_allclose(first.left.most.numpy(), again.left.most.numpy(), atol=1e-6)
    assert BaseSpectrum("w", weight + 1e-3, Search(cache=cache)).known_basis() is None


def test_a_wrong_basis_in_the_cache_is_not_believed(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, other = base_weight(200, 160, generator), base_weight(200, 160, generator)
    cache = Cache(tmp_path)
    spectrum = BaseSpectrum("w", weight, Search(cache=cache))
    wrong = torch.linalg.svd(other.double(), full_matrices=False)
    cache.write(spectrum._key, dict(zip(("u", "s", "vt"), wrong, strict=True)), name="w")
    assert spectrum.known_basis() is None
    u, s, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    cache.write(spectrum._key, {"u": u, "s": s}, name="w")
    assert BaseSpectrum("w", weight, Search(cache=cache)).known_basis() is None
    np.testing.assert_allclose(spectrum.basis().s.numpy(), s.numpy(), rtol=1e-6)
