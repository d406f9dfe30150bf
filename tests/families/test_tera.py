"""TeRA: planted scales found, sizes, ranks and energies as told, other generators noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loratools.errors import AdapterError, UsageError
from loratools.families import TeRA
from loratools.families.base import Layout
from loratools.families.fitting import Source
from loratools.families.tera import TeRAOptions, drawn
from loratools.linalg.inner import relative_error
from loratools.linalg.svd import spectrum
from loratools.operators import Dense, LowRank, Operator


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(delta: Operator) -> Source:
    return Source(delta, Layout(shape=delta.shape), None, torch.float64, 3)


def member(shape: tuple[int, int], options: TeRAOptions, seed: int = 0) -> TeRA:
    """Random scales for the modes that an encoder would choose."""
    empty = TeRA.encode(source(LowRank(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))), options)
    return replace(empty, d=rand(seed, len(empty.d)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((24, 16), TeRAOptions(3)),
        ((64, 36), TeRAOptions(6)),  # of full rank
        ((60, 48), TeRAOptions(3, 3)),
        ((13, 30), TeRAOptions(4)),  # a side that has no divisors
        ((40, 30), TeRAOptions(7, 1)),
    ],
)
def test_planted_scales_are_found(shape: tuple[int, int], options: TeRAOptions, seed: int) -> None:
    delta = member(shape, options, seed).operator()
    assert relative_error(delta, TeRA.encode(source(delta), options).operator()) < 1e-6


def test_factors_are_not_needed_as_a_product() -> None:
    """A delta of factors and the same delta dense come out alike."""
    low = LowRank(rand(0, 24, 3), rand(1, 3, 20), -0.7)
    one, two = (TeRA.encode(source(delta), TeRAOptions(4)) for delta in (low, Dense(low.dense())))
    torch.testing.assert_close(one.operator().dense(), two.operator().dense(), rtol=1e-6, atol=1e-8)


def test_no_small_change_brings_it_nearer() -> None:
    delta = rand(0, 24, 20)
    found = TeRA.encode(source(Dense(delta)), TeRAOptions(4))
    d = found.d.clone().requires_grad_()
    lost = (delta - replace(found, d=d).operator().dense()).square().sum()
    (slope,) = torch.autograd.grad(lost, d)
    captured = float(delta.square().sum() - lost.detach())
    assert float(slope.norm() * found.d.norm()) < 0.1 * captured


def test_its_rank_is_a_product_and_its_size_a_sum() -> None:
    made = member((64, 64), TeRAOptions(4))
    values = spectrum(made.operator())
    assert int((values > 1e-9 * values[0]).sum()) == 16
    assert len(made.d) == 16
    full = spectrum(member((64, 64), TeRAOptions(8)).operator())
    assert int((full > 1e-9 * full[0]).sum()) == 64


def test_a_generic_delta_keeps_about_the_share_that_is_expected() -> None:
    given = source(Dense(rand(0, 60, 48)))
    kept = 1 - relative_error(given.delta, TeRA.encode(given, TeRAOptions(5)).operator().to(torch.float64)) ** 2
    expected = TeRA.expected_energy(given, TeRAOptions(5))
    assert expected == pytest.approx(17 / (60 * 48))
    assert expected < kept < 4 * expected


def test_other_random_numbers_are_noticed() -> None:
    made = member((24, 16), TeRAOptions(3))
    with pytest.raises(AdapterError, match="not drawn here as they were"):
        replace(made, checksum="0" * 16).operator()
    assert drawn((4, 6, 4, 4), (3, 3, 3, 3), 3)[2] == made.checksum == "ad3312de4b09dfa7"


@pytest.mark.parametrize("change", [{"ranks": [3, 3, 3]}, {"seed": "x"}, {"outputs": None}, {"ranks": [3, 3, 3, 4]}])
def test_settings_that_tell_no_tensor_are_refused(change: dict[str, object]) -> None:
    made = member((24, 16), TeRAOptions(3))
    settings = {**made.stated_settings(), **change}
    with pytest.raises(AdapterError, match=r"its settings state|are not those of modes"):
        TeRA.from_parameters(made.parameters(), scale=1.0, layout=Layout(), settings=settings)


def test_what_has_no_modes_is_refused() -> None:
    with pytest.raises(UsageError, match="have to be 1 or more"):
        TeRA.encode(source(Dense(rand(0, 6, 4))), TeRAOptions(0))
