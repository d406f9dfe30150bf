"""PETL-ViT's quantiser, by loops over single numbers and by the authors' way to their codebook."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest
import torch

from loratools.errors import AdapterError
from loratools.quant import codec
from loratools.quant.codebooks import levels
from loratools.quant.petl import encode, fake_quantise, file_size, from_bytes, record_size

GAUSS = NormalDist()


def codebook(bits: int) -> tuple[list[float], list[float]]:
    """Levels and boundaries after 500 rounds from zero, as the authors compute them."""
    values = [0.0] * 2**bits
    bounds: list[float] = []
    for _ in range(500):
        bounds = [(a + b) / 2 for a, b in itertools.pairwise(values)]
        edges = [0.0, *(GAUSS.cdf(b) for b in bounds), 1.0]
        values = [GAUSS.inv_cdf((a + b) / 2) for a, b in itertools.pairwise(edges)]
    return values, bounds


def naive(weight: Sequence[float], bits: int) -> tuple[list[int], float, float]:
    """Codes, mean and deviation, in doubles."""
    n = len(weight)
    mean = math.fsum(weight) / n
    deviation = math.sqrt(math.fsum((w - mean) ** 2 for w in weight) / (n - 1))
    _, bounds = codebook(bits)
    return [sum((w - mean) / (deviation + 1e-5) > b for b in bounds) for w in weight], mean, deviation


def numbers(*shape: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_and_codes_are_the_authors(bits: int) -> None:
    """On numbers whose deviation 1e-5 matters for, and on others."""
    values, bounds = codebook(bits)
    for spread in (1.0, 3e-5, 100.0):
        weight = numbers(12, 20, seed=bits, spread=spread) + spread / 3
        found = encode(weight, bits)
        codes, mean, deviation = naive(weight.flatten().tolist(), bits)
        z = [(w - mean) / (deviation + 1e-5) for w in weight.flatten().tolist()]
        clear = [i for i, x in enumerate(z) if min(abs(x - b) for b in bounds) > 1e-5]
        assert len(clear) > 230
        assert [found.codes.flatten().tolist()[i] for i in clear] == [codes[i] for i in clear]
        assert found.mean == pytest.approx(mean, rel=1e-5, abs=1e-6 * spread)
        assert found.deviation == pytest.approx(deviation, rel=1e-5)
        wanted = np.float32(values)[found.codes.numpy()] * np.float32(found.deviation) + np.float32(found.mean)
        assert np.array_equal(found.decode().numpy(), wanted)
        assert torch.equal(fake_quantise(weight, bits), found.decode())
    assert levels("median", bits) == pytest.approx(values, abs=2e-7)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_container_of_quantize_holds_the_same_numbers(bits: int) -> None:
    """Its moments are those of doubles, rounded once; only what lies on a boundary may get another code."""
    for spread in (1.0, 1e-4):
        weight = numbers(24, 40, seed=20 + bits, spread=spread) - spread / 4
        found = encode(weight, bits)
        ours = codec.encode(weight, codec.Coding(bits, "median", -1, offset=True, stored="F32"), "moments")
        assert ours.offsets is not None
        assert float(ours.offsets) == pytest.approx(found.mean, rel=1e-6, abs=1e-7 * spread)
        assert float(ours.scales) == pytest.approx(found.deviation, rel=1e-6)
        assert torch.equal(ours.codes, found.codes)
        torch.testing.assert_close(ours.decode(), found.decode(), rtol=1e-5, atol=1e-6 * spread)


def test_the_deviation_is_unbiased_and_a_tie_goes_down() -> None:
    found = encode(torch.tensor([-1.0, 0.0, 1.0]), 1)
    assert (found.mean, found.deviation) == (0.0, 1.0)  # the biased one is 0.816
    assert found.codes.tolist() == [0, 0, 1]
    assert found.decode().tolist() == pytest.approx([-0.67449, -0.67449, 0.67449], abs=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [0.0, -2.5, 0.1])
def test_a_constant_stays_what_it_is(bits: int, value: float) -> None:
    weight = torch.full((3, 8), value)
    torch.testing.assert_close(fake_quantise(weight, bits), weight, rtol=1e-6, atol=1e-9)


def test_half_precision_is_coded_as_float32() -> None:
    weight = numbers(8, 8).bfloat16()
    assert torch.equal(encode(weight, 2).codes, encode(weight.float(), 2).codes)
    assert fake_quantise(weight, 2).dtype == torch.float32


@pytest.mark.parametrize(
    ("weight", "bits", "problem"),
    [
        (torch.ones(1, 1), 1, r"\(1, 1\) has no deviation"),
        (torch.ones(0, 4), 1, r"\(0, 4\) has no deviation"),
        (torch.tensor([1.0, math.nan]), 1, "NaN or infinity"),
        (torch.tensor([1.0, -math.inf]), 2, "NaN or infinity"),
        (torch.tensor([3e38, -3e38]), 1, "beyond what float32"),
        (torch.ones(8), 5, "1, 2, 3, 4 bits here, not 5"),
    ],
)
def test_what_has_no_codes_is_refused(weight: torch.Tensor, bits: int, problem: str) -> None:
    with pytest.raises(AdapterError, match=problem):
        encode(weight, bits)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_record_is_codes_mean_and_deviation(bits: int) -> None:
    weight = numbers(6, 16, seed=bits + 10)
    found = encode(weight, bits)
    per_byte = 8 // bits
    flat = found.codes.flatten().tolist()
    wanted = b""
    for i in range(0, len(flat), per_byte):
        byte = 0
        for j in range(per_byte):
            byte += flat[i + j] * (2**bits) ** j
        wanted += bytes([byte])
    wanted += struct.pack("<f", found.mean) + struct.pack("<f", found.deviation)
    assert found.to_bytes() == wanted
    assert len(wanted) == record_size(96, bits) == 96 * bits // 8 + 8
    again = from_bytes(wanted, bits, (6, 16))
    assert torch.equal(again.codes, found.codes)
    assert (again.mean, again.deviation) == (found.mean, found.deviation)
    with pytest.raises(ValueError, match="are not the record of 96 codes"):
        from_bytes(wanted[:-1], bits, (6, 16))


def test_a_record_of_broken_bytes_is_refused() -> None:
    with pytest.raises(AdapterError, match="9 codes of 1 bits fill no whole bytes"):
        encode(numbers(3, 3), 1).to_bytes()
    with pytest.raises(AdapterError, match="codes of 1, 2, 4 bits, not 3"):
        encode(numbers(8, 8), 3).to_bytes()


def test_the_size_of_the_published_example() -> None:
    """lora/cifar-bit1-dim32.bin of the authors' repository."""
    assert file_size([768 * 32] * 48, 1, whole=768 * 100 + 100) == 455_440 == 48 * (3072 + 8) + (768 * 100 + 100) * 4
