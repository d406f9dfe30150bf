"""Codebooks against the conditions that define them, by the standard library's Gaussian."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist
from typing import Literal

import pytest
import torch

from loratools.quant.codebooks import cells as cells_of
from loratools.quant.codebooks import levels, nearest, values_of

GAUSS = NormalDist()


def cells(values: tuple[float, ...]) -> list[tuple[float, float]]:
    bounds = [-math.inf, *((a + b) / 2 for a, b in pairwise(values)), math.inf]
    return list(pairwise(bounds))


def cdf(x: float) -> float:
    return GAUSS.cdf(x) if math.isfinite(x) else float(x > 0)


def integral(f: object, low: float, high: float, steps: int = 20_000) -> float:
    """Simpson's rule over the part of a cell that matters."""
    a, b = max(low, -9.0), min(high, 9.0)
    h = (b - a) / steps
    at = [f(a + i * h) for i in range(steps + 1)]  # type: ignore[operator]
    return h / 3 * (at[0] + at[-1] + 4 * sum(at[1:-1:2]) + 2 * sum(at[2:-1:2]))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_medians_halve_the_probability_of_their_cells(bits: int) -> None:
    values = levels("median", bits)
    for value, (low, high) in zip(values, cells(values), strict=True):
        assert GAUSS.inv_cdf((cdf(low) + cdf(high)) / 2) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lloyd_levels_are_the_means_of_their_cells_by_quadrature(bits: int) -> None:
    values = levels("lloyd", bits)
    for value, (low, high) in zip(values, cells(values), strict=True):
        mean = integral(lambda x: x * GAUSS.pdf(x), low, high) / integral(GAUSS.pdf, low, high)
        assert mean == pytest.approx(value, abs=1e-6)


def test_published_numbers() -> None:
    assert levels("median", 1) == pytest.approx((-0.67449, 0.67449), abs=5e-6)
    assert levels("median", 2)[2:] == pytest.approx((0.37775, 1.26572), abs=5e-6)
    assert levels("median", 3)[4:] == pytest.approx((0.20262, 0.62542, 1.11373, 1.79203), abs=5e-6)
    of_four = (0.10555, 0.31904, 0.54007, 0.77519, 1.03401, 1.33311, 1.70774, 2.26549)
    assert levels("median", 4)[8:] == pytest.approx(of_four, abs=5e-6)
    assert levels("lloyd", 1)[1] == pytest.approx(math.sqrt(2 / math.pi), abs=1e-7)


@pytest.mark.parametrize("name", ["median", "lloyd"])
def test_errors_of_one_bit_on_gaussian_numbers(name: Literal["median", "lloyd"]) -> None:
    values = levels(name, 1)
    both = list(zip(values, cells(values), strict=True))
    mean_square = sum(integral(lambda x, v=v: (x - v) ** 2 * GAUSS.pdf(x), *c) for v, c in both)
    closed_form = 1 - 2 * values[1] * math.sqrt(2 / math.pi) + values[1] ** 2
    assert mean_square == pytest.approx(closed_form, abs=1e-6)
    assert closed_form == pytest.approx({"median": 0.3786, "lloyd": 0.3634}[name], abs=5e-5)


@pytest.mark.parametrize(
    ("name", "bits"), [*((n, b) for n in ("median", "lloyd", "uniform") for b in (1, 2, 3, 4)), ("nf", 3), ("nf", 4)]
)
def test_the_nearest_level_is_the_nearest(name: str, bits: int) -> None:
    x = torch.linspace(-4, 20, 997)
    values = levels(name, bits)  # type: ignore[arg-type]
    codes = nearest(x, name, bits)  # type: ignore[arg-type]
    naive = [min(abs(v - number) for v in values) for number in x.tolist()]
    assert (values_of(codes, name, bits) - x).abs().tolist() == pytest.approx(naive, abs=1e-5)  # type: ignore[arg-type]


def test_normal_float_is_that_of_bitsandbytes() -> None:
    def tail(p: float) -> float:
        return GAUSS.inv_cdf(p)

    offset = 0.9677083
    positive = [tail(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-tail(offset + (0.5 - offset) * i / 7) for i in range(7)]
    naive = sorted(v / positive[0] for v in (*positive, *negative, 0.0))
    assert levels("nf", 4) == pytest.approx(naive, abs=1e-6)


def test_a_codebook_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="no codebook nf of 1 bits"):
        levels("nf", 1)


@pytest.mark.parametrize("upper", [True, False])
def test_a_number_on_a_boundary_goes_up_or_stays(upper: bool) -> None:
    bounds = [-1.5, 0.0, 0.25]
    numbers = [-9.0, -1.5, -1.0, -0.0, 0.0, 0.1, 0.25, 0.3]
    naive = [sum(x >= b if upper else x > b for b in bounds) for x in numbers]
    assert cells_of(torch.tensor(numbers), torch.tensor(bounds), upper=upper).tolist() == naive


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
@pytest.mark.parametrize(("name", "bits"), [("lloyd", 1), ("nf", 2), ("lloyd", 3), ("nf", 4), ("uniform", 3)])
def test_levels_stand_at_their_codes(count: int, name: Literal["lloyd", "nf", "uniform"], bits: int) -> None:
    codes = torch.randint(0, 2**bits, (count + 1,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([levels(name, bits)[c] for c in codes.tolist()], dtype=torch.float32)
    assert torch.equal(values_of(codes, name, bits), expected)
    assert torch.equal(values_of(codes[1:], name, bits), expected[1:])  # whose bytes lie at an odd place
