"""WaveFT and FourierFT: the least squares that their encoders solve, against the matrix of all atoms."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.errors import AdapterError, UsageError
from loratools.families import FourierFT, WaveFT
from loratools.families.base import Layout
from loratools.families.fitting import Source, options_of
from loratools.families.fourierft import FourierFTOptions
from loratools.families.random_places import drawn
from loratools.families.waveft import WaveFTOptions
from loratools.linalg.inner import relative_error
from loratools.operators import Dense, LowRank, Operator

each_kind = pytest.mark.parametrize("kind", ["factors", "dense"])


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(kind: str, shape: tuple[int, int], seed: int = 0) -> Source:
    low = LowRank(rand(1, shape[0], 3), rand(2, 3, shape[1]), -0.5)
    delta: Operator = low if kind == "factors" else Dense(low.dense())
    return Source(delta, Layout(shape=shape), None, torch.float64, seed)


def atoms(update: FourierFT | WaveFT) -> np.ndarray:
    """The deltas of single coefficients as columns, each decoded by itself."""
    columns = []
    for i in range(len(update.spectrum)):
        unit = torch.zeros_like(update.spectrum)
        unit[i] = 1.0
        columns.append(dataclasses.replace(update, spectrum=unit).operator().dense().numpy().reshape(-1))
    return np.stack(columns, axis=1)


def assert_least_squares(update: FourierFT | WaveFT, given: Source) -> None:
    matrix, target = atoms(update), given.delta.dense().numpy().reshape(-1)
    best = np.linalg.lstsq(matrix, target, rcond=1e-9)[0]
    wanted = np.linalg.norm(matrix @ best - target)
    assert np.linalg.norm(update.operator().dense().numpy().reshape(-1) - target) == pytest.approx(
        wanted, rel=1e-9, abs=1e-9
    )
    np.testing.assert_allclose(update.spectrum.numpy(), best, rtol=1e-6, atol=1e-6 * np.abs(best).max())


@each_kind
@pytest.mark.parametrize("shape", [(8, 6), (7, 9), (6, 7)])
@pytest.mark.parametrize("count", [5, 20, 42])
def test_fourierft_is_the_least_squares_solution(kind: str, shape: tuple[int, int], count: int) -> None:
    """At 42 places most cosines were drawn twice, and those that are their own mirror images once."""
    given = source(kind, shape, seed=4)
    assert_least_squares(FourierFT.encode(given, FourierFTOptions(count)), given)


@each_kind
@pytest.mark.parametrize("shape", [(8, 6), (16, 16), (7, 16), (24, 11)])
@pytest.mark.parametrize("wavelet", ["db1", "db2", "db3", "sym4", "coif1"])
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_waveft_is_the_least_squares_solution(kind: str, shape: tuple[int, int], wavelet: str, share: float) -> None:
    given = source(kind, shape, seed=3)
    count = round(share * shape[0] * shape[1])
    assert_least_squares(WaveFT.encode(given, WaveFTOptions(count, wavelet)), given)


@each_kind
def test_waveft_without_a_transform_keeps_entries(kind: str) -> None:
    given = source(kind, (8, 6))
    update = WaveFT.encode(given, options_of(WaveFT, {"wavelet": "none", "count": "10"}))
    places = drawn(48, 10, 0)
    assert update.wavelet is None
    torch.testing.assert_close(update.spectrum, given.delta.dense().reshape(-1)[places])


def test_seeds_say_where() -> None:
    one, two = (FourierFT.encode(source("dense", (8, 6), seed), FourierFTOptions(10)) for seed in (1, 2))
    assert (one.seed, two.seed) == (1, 2)
    assert not torch.equal(one.spectrum, two.spectrum)
    assert one.stated_settings() == {"seed": 1}


@pytest.mark.parametrize("family", [WaveFT, FourierFT])
def test_energy_is_that_of_a_random_subspace(family: type[WaveFT] | type[FourierFT]) -> None:
    noise = Source(Dense(rand(7, 96, 64)), Layout(shape=(96, 64)), None, torch.float64)
    options = options_of(family, {"count": "1500"})
    expected = family.expected_energy(noise, options)
    assert expected == pytest.approx(1500 / (96 * 64), rel=0.15)
    kept = 1 - relative_error(noise.delta, family.encode(noise, options).operator()) ** 2
    assert kept == pytest.approx(expected, rel=0.1)


def test_counts_beyond_all_entries_are_all() -> None:
    given = source("dense", (8, 6))
    update = WaveFT.encode(given, WaveFTOptions())
    assert len(update.spectrum) == 48
    assert relative_error(given.delta, update.operator()) < 1e-9
    with pytest.raises(UsageError, match="count is 0"):
        WaveFTOptions(0)


@pytest.mark.parametrize("family", [WaveFT, FourierFT])
def test_settings_without_a_seed(family: type[WaveFT] | type[FourierFT]) -> None:
    held = family.encode(source("dense", (8, 6)), family.Options()).parameters()
    with pytest.raises(AdapterError, match="None for seed"):
        family.from_parameters(held, scale=1.0, layout=Layout())
