"""Deltas that a family of wavelets can hold are found again, in the numbers and bytes that it says it takes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor

from loratools.errors import AdapterError, UsageError
from loratools.families import WaRA, WaveletBands, WaveletSparse
from loratools.families.base import Layout
from loratools.families.fitting import Source, options_of
from loratools.families.places import places_nbytes
from loratools.families.wara import WaRAOptions
from loratools.families.wavelet import WaveletOptions
from loratools.families.wavelet_sparse import WaveletSparseOptions
from loratools.linalg.inner import frobenius, relative_error
from loratools.operators import Dense, LowRank, Operator, Sum, sum_of

ADAPTER = Path(__file__).resolve().parents[3] / "shared" / "adapters" / "en_lora_r8"
each_kind = pytest.mark.parametrize("kind", ["factors", "dense"])


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(delta: Operator) -> Source:
    return Source(delta, Layout(shape=delta.shape), None, torch.float64)


def low(m: int, n: int, rank: int) -> LowRank:
    return LowRank(rand(0, m, rank), rand(1, rank, n), 0.5)


def of_kind(op: LowRank, kind: str) -> Operator:
    return op if kind == "factors" else Dense(op.dense())


@pytest.mark.parametrize("shape", [(32, 48), (31, 45)])
@pytest.mark.parametrize(("wavelet", "levels"), [("db1", 1), ("db3", 2), ("sym4", 3)])
def test_all_singular_values_are_a_lossless_delta(shape: tuple[int, int], wavelet: str, levels: int) -> None:
    delta = low(*shape, 2)
    update = WaveletBands.encode(source(delta), WaveletOptions(None, wavelet, levels))
    assert relative_error(delta, update.operator()) < 1e-9


@each_kind
@pytest.mark.parametrize(("wavelet", "levels"), [("db1", 1), ("db2", 2)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_that_of_the_singular_values_left_out(kind: str, wavelet: str, levels: int, rank: int) -> None:
    """Parseval: the squared error is the sum over all bands of PyWavelets' transform, of the smallest values."""
    delta = low(32, 48, 2)
    update = WaveletBands.encode(source(of_kind(delta, kind)), WaveletOptions(rank, wavelet, levels))
    whole = pywt.wavedec2(delta.dense().numpy(), wavelet, mode="periodization", level=levels)
    bands = [whole[0], *(band for three in whole[1:] for band in three)]
    values = np.sort(np.concatenate([np.linalg.svd(band, compute_uv=False) for band in bands]))[::-1]
    assert frobenius(sum_of([delta, -update.operator()])) == pytest.approx(
        math.sqrt(float((values[rank:] ** 2).sum())), rel=1e-9
    )
    assert int(update.tensors["wavelet_ranks"].sum()) == rank


def test_numbers_are_those_of_the_bands_that_were_chosen() -> None:
    update = WaveletBands.encode(source(low(32, 47, 3)), WaveletOptions(5))
    ranks = update.tensors["wavelet_ranks"].tolist()
    sides = [(16, 24), (16, 23), (16, 24), (16, 23)]
    wanted = sum(k * (m + n) for k, (m, n) in zip(ranks, sides, strict=True)) + len(ranks)
    assert sum(t.numel() for t in update.parameters().values()) == wanted


def test_dense_deltas_must_be_told_a_rank() -> None:
    for family in (WaveletBands, WaRA):
        with pytest.raises(AdapterError, match="rank=N"):
            family.encode(source(Dense(rand(0, 8, 8))), family.Options())


@pytest.mark.parametrize("family", [WaveletBands, WaveletSparse])
def test_options_that_no_shape_allows(family: type[WaveletBands] | type[WaveletSparse]) -> None:
    with pytest.raises(UsageError, match="no orthogonal one"):
        options_of(family, {"wavelet": "bior2.2"})
    with pytest.raises(UsageError, match="levels is 0"):
        options_of(family, {"levels": "0"})
    with pytest.raises(AdapterError, match="has 3 levels of wavelets, not 4"):
        family.encode(source(low(8, 16, 1)), options_of(family, {"levels": "4"}))


@each_kind
@pytest.mark.parametrize("shape", [(32, 48), (31, 45)])
@pytest.mark.parametrize(("wavelet", "levels"), [("db1", 1), ("db3", 2), ("sym4", 3)])
def test_planted_coefficients_are_found(kind: str, shape: tuple[int, int], wavelet: str, levels: int) -> None:
    """A delta of few coefficients, and the same as factors, which are transformed in place of it."""
    options = WaveletSparseOptions(9, wavelet=wavelet, levels=levels)
    planted = WaveletSparse.encode(source(Dense(rand(5, *shape))), options)
    truth = planted.operator().dense()
    u, s, vt = torch.linalg.svd(truth, full_matrices=False)
    rank = int((s > 1e-9 * s[0]).sum())
    factors = LowRank(u[:, :rank] * s[:rank], vt[:rank])
    found = WaveletSparse.encode(source(of_kind(factors, kind)), options)
    assert torch.equal(found.places, planted.places)
    assert relative_error(Dense(truth), found.operator()) < 1e-6


@pytest.mark.parametrize("levels", [1, 2])
def test_the_largest_coefficients_of_pywavelets_are_kept(levels: int) -> None:
    delta = low(32, 48, 2)
    update = WaveletSparse.encode(source(delta), WaveletSparseOptions(50, wavelet="db2", levels=levels))
    whole = pywt.wavedec2(delta.dense().numpy(), "db2", mode="periodization", level=levels)
    sizes = np.sort(np.abs(pywt.coeffs_to_array(whole)[0]).reshape(-1))[::-1]
    np.testing.assert_allclose(update.values.abs().sort(descending=True).values.numpy(), sizes[:50], rtol=1e-9)
    assert frobenius(sum_of([delta, -update.operator()])) == pytest.approx(
        math.sqrt(float((sizes[50:] ** 2).sum())), rel=1e-9
    )
    assert sum(t.nbytes for t in update.parameters().values()) == 50 * 8 + places_nbytes(50, 32 * 48)


def test_the_distance_from_factors_is_taken_among_coefficients() -> None:
    delta = low(32, 48, 2)
    made = WaveletSparse.encode(source(delta), WaveletSparseOptions(50)).operator()
    whole = delta - made
    assert isinstance(whole, Sum)
    assert frobenius(whole) == pytest.approx(float((delta.dense() - made.dense()).norm()), rel=1e-12)
    assert frobenius(made) == pytest.approx(float(made.dense().norm()), rel=1e-12)


@each_kind
def test_planted_wara_is_found(kind: str) -> None:
    planted = WaRA(rand(0, 3, 24), rand(1, 16, 3))
    op = planted.operator()
    assert isinstance(op, LowRank)
    np.testing.assert_allclose(op.dense().numpy(), np.kron((planted.up @ planted.down).numpy(), np.eye(2)), atol=1e-12)
    found = WaRA.encode(source(of_kind(op, kind)), WaRAOptions(3))
    assert relative_error(op, found.operator()) < 1e-6
    assert sum(t.numel() for t in found.parameters().values()) == 3 * (32 + 48) // 2


@each_kind
@pytest.mark.parametrize("rank", [1, 2, 16])
def test_wara_is_the_projection(kind: str, rank: int) -> None:
    """error^2 = ||delta||^2 - 2 ||M_r||^2, M the mean of the two diagonals of each 2 x 2 block."""
    delta = low(32, 48, 3)
    dense = delta.dense().numpy()
    mean = (dense[0::2, 0::2] + dense[1::2, 1::2]) / 2
    kept = np.linalg.svd(mean, compute_uv=False)[:rank]
    found = WaRA.encode(source(of_kind(delta, kind)), WaRAOptions(rank))
    wanted = math.sqrt((dense**2).sum() - 2 * (kept**2).sum())
    assert frobenius(sum_of([delta, -found.operator()])) == pytest.approx(wanted, rel=1e-9)


def test_wara_keeps_a_quarter_of_noise_at_full_rank() -> None:
    noise = Dense(rand(3, 200, 160))
    found = WaRA.encode(source(noise), WaRAOptions(80))
    kept = 1 - relative_error(noise, found.operator()) ** 2
    assert kept == pytest.approx(0.25, abs=0.02)
    assert WaRA.expected_energy(source(noise), WaRAOptions(80)) == 0.25


def test_wara_pairs_channels() -> None:
    with pytest.raises(AdapterError, match="odd side"):
        WaRA.encode(source(low(7, 8, 1)), WaRAOptions())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({}, "name no wavelet"), ({"wavelet": 3}, "name no wavelet"), ({"wavelet": "db1", "levels": 0}, "state 0 levels")],
)
def test_settings_that_say_too_little(settings: dict[str, object], problem: str) -> None:
    held = WaveletSparse.encode(source(low(8, 8, 1)), WaveletSparseOptions(5)).parameters()
    with pytest.raises(AdapterError, match=problem):
        WaveletSparse.from_parameters(held, scale=1.0, layout=Layout(), settings=settings)
