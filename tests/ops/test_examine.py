"""Verdicts by bounds and by the whole basis of W0, against float64 SVDs of W0 and of W0 + delta."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from loratools.cache import Cache
from loratools.operators import Dense, LowRank, Operator, sum_of
from loratools.ops.base_spectra import BaseSpectrum, Method, Search
from loratools.ops.examine import Examined, examine, tuned_triplets

SIZES = ((300, 300), (280, 400), (400, 280), (150, 240), (420, 310))  # float32 where the shorter side is above 256


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


@pytest.mark.parametrize(("m", "n"), [(190, 300), (300, 280)])
def test_tuned_triplets_are_exact(m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, change = base_weight(m, n, generator).double() * 1e9, low_rank(m, n, 3e9, generator)
    u, s, vt = tuned_triplets(BaseSpectrum("w", weight), change, 6)
    whole = weight + change.to(torch.float64).dense()
    np.testing.assert_allclose((whole @ vt.T).numpy(), (u * s).numpy(), atol=1e-6 * 1e9)
    np.testing.assert_allclose(s.numpy(), np.linalg.svd(whole.numpy(), compute_uv=False)[:6], rtol=1e-12)


def with_spectrum(m: int, n: int, spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    p = min(m, n)
    u = torch.linalg.qr(torch.randn(m, p, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, p, generator=generator, dtype=torch.float64)).Q
    return (u * spectrum) @ v.T


def plateau(count: int) -> torch.Tensor:
    return torch.cat([torch.tensor([1, 0.9, 0.8]), torch.full((count - 3,), 0.5)]).double()


@pytest.mark.parametrize("method", ["certified", "dense"])
def test_bounds_hold_over_a_plateau(method: Method) -> None:
    """Where the Krylov space is exhausted after four blocks."""
    weight = with_spectrum(600, 600, plateau(600)).float()
    u, _, vt = np.linalg.svd(weight.double().numpy())
    generator = torch.Generator().manual_seed(1)
    noise = torch.nn.functional.normalize(torch.randn(600, 2, generator=generator, dtype=torch.float64), dim=0)
    left = torch.stack([torch.from_numpy(u[:, 1]), noise[:, 0]], dim=1) * torch.tensor([20.0, 10.0])
    change = LowRank(left, torch.stack([torch.from_numpy(vt[1]), noise[:, 1]]))
    found = examine(BaseSpectrum("w", weight, Search(method)), change, top_k=1, thresholds=(0.5,))
    true = naive(weight, change, 1)[0].max()
    assert float(found.left.least[0]) - 1e-3 <= true <= float(found.left.most[0]) + 1e-3


@pytest.mark.parametrize("method", ["certified", "dense"])
def test_a_tall_weight_may_be_nearly_singular_without_showing_it(method: Method) -> None:
    """Pivots near 1 and a least singular value of 1e-10: the vector that belongs to it is no intruder."""
    m, p = 400, 300
    v = torch.sqrt(0.9 ** torch.arange(p).double())
    v /= v.norm()
    weight = with_spectrum(m, p, torch.logspace(0, -1.5, p).double(), seed=5) @ (
        torch.eye(p).double() - (1 - 1e-9) * torch.outer(v, v)
    )
    last = torch.linalg.svd(weight, full_matrices=False).U[:, -1:].contiguous()
    right = torch.nn.functional.normalize(torch.randn(1, p, generator=torch.Generator().manual_seed(0)).double())
    found = examine(BaseSpectrum("w", weight, Search(method)), LowRank(50 * last, right), top_k=1, thresholds=(0.5,))
    assert float(found.left.most[0]) > 0.9


@pytest.mark.parametrize("k", [100, 250])
def test_a_large_share_of_all_vectors(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, change = torch.randn(330, 330, generator=generator) / 18, low_rank(330, 330, 1.0, generator)
    found = examine(BaseSpectrum("w", weight, Search("dense")), change, top_k=k, thresholds=(0.5,))
    left, right, s = naive(weight, change, k)
    np.testing.assert_allclose(found.values.numpy(), s, rtol=1e-4)
    for side, cosines in ((found.left, left), (found.right, right)):
        assert abs(int((side.most < 0.5).sum()) - int((cosines.max(1) < 0.5).sum())) <= 1


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e20])
@pytest.mark.parametrize("method", ["certified", "dense"])
def test_the_scale_does_not_matter(scale: float, method: Method) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, change = base_weight(320, 300, generator), low_rank(320, 300, 3.0, generator)
    plain = examine(BaseSpectrum("w", weight, Search(method)), change, top_k=5, thresholds=(0.5,))
    scaled = examine(BaseSpectrum("w", weight * scale, Search(method)), change * scale, top_k=5, thresholds=(0.5,))
    np.testing.assert_allclose(scaled.values.numpy(), plain.values.numpy() * scale, rtol=1e-5)
    assert ((scaled.left.most < 0.5) == (plain.left.most < 0.5)).all()


def test_close_pairs_inside_the_spectrum_are_decided_in_float64() -> None:
    spectrum = torch.linspace(1, 0.1, 400).double()
    spectrum[201] = spectrum[200] * (1 - 1e-7)
    weight = with_spectrum(400, 400, spectrum)
    u, _, vt = torch.linalg.svd(weight)
    change = LowRank(20 * u[:, 200:201], vt[200:201])
    found = examine(BaseSpectrum("w", weight, Search("dense")), change, top_k=1, thresholds=(0.9,))
    assert float(found.left.most[0]) > 0.99


def test_a_rank_deficient_base() -> None:
    generator = torch.Generator().manual_seed(11)
    weight = base_weight(400, 300, generator)
    weight[:, 200:] = 0
    change = low_rank(400, 300, 4.0, generator)
    base = BaseSpectrum("w", weight, Search("certified"))
    assert_agrees(examine(base, change, top_k=5, thresholds=(0.5,)), weight, change, (0.5,), 5)


def test_nothing_changed_and_nothing_there() -> None:
    weight = base_weight(300, 300, torch.Generator().manual_seed(0))
    nothing = LowRank(torch.zeros(300, 2), torch.zeros(2, 300))
    something = low_rank(300, 300, 2.0, torch.Generator().manual_seed(1))
    true = np.linalg.svd(something.dense().double().numpy(), compute_uv=False)[:3]
    methods: tuple[Method, ...] = ("certified", "dense")
    for method in methods:
        found = examine(BaseSpectrum("w", weight, Search(method)), nothing, top_k=10, thresholds=(0.5,))
        assert float(found.left.least.min()) > 0.99
        empty = BaseSpectrum("w", torch.zeros(300, 300), Search(method))
        assert not examine(empty, nothing, top_k=3, thresholds=(0.5,)).values.any()
        values = examine(empty, something, top_k=3, thresholds=(0.5,)).values
        np.testing.assert_allclose(values.numpy(), true, rtol=1e-5, atol=1e-6)


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
    weight, other = base_weight(200, 160, generator), base_weight(200, 160, generator)  # small: in float64
    cache = Cache(tmp_path)
    spectrum = BaseSpectrum("w", weight, Search(cache=cache))
    wrong = torch.linalg.svd(other.double(), full_matrices=False)
    cache.write(spectrum._key, dict(zip(("u", "s", "vt"), wrong, strict=True)), name="w")
    assert spectrum.known_basis() is None
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    cache.write(spectrum._key, {"u": 3 * u, "s": s / 3, "vt": vt}, name="w")
    assert spectrum.known_basis() is None
    cache.write(spectrum._key, {"u": u, "s": s}, name="w")
    assert BaseSpectrum("w", weight, Search(cache=cache)).known_basis() is None
    np.testing.assert_allclose(spectrum.basis(torch.float64).s.numpy(), s.numpy(), rtol=1e-6)
