"""Random projections of operators, against dense matrices in float64."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from loratools.linalg.projection import SIDE, _shared, _signs, projected
from loratools.operators import BlockDiagonal, Dense, Kronecker, LowRank, Operator, scattered, sum_of


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STRUCTURES: dict[str, Operator] = {
    "low rank": LowRank(rand(24, 3), rand(3, 36, seed=1), 0.5),
    "dense": Dense(rand(24, 36)),
    "sparse": scattered(torch.tensor([5, 100, 7, 5]), rand(4), (24, 36)),
    "kronecker": Kronecker(Dense(rand(4, 6)), LowRank(rand(6, 2), rand(2, 6)), 2.0),
    "blocks": BlockDiagonal((LowRank(rand(10, 2), rand(2, 16)), Dense(rand(14, 20)))),
    "sum": sum_of([LowRank(rand(24, 3), rand(3, 36)), scattered(torch.tensor([5, 7]), rand(2), (24, 36))]),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_is_projected_as_its_dense_matrix(name: str) -> None:
    op = STRUCTURES[name]
    left = _signs("rows 3 24 36 here", 24)[:, None] * _shared("rows 3", 24)
    right = _signs("columns 3 24 36 here", 36)[:, None] * _shared("columns 3", 36)
    expected = left.double().T @ op.to(torch.float64).dense() @ right.double() / SIDE
    torch.testing.assert_close(projected(op, "here", 3).double(), expected, rtol=1e-5, atol=1e-4)


def test_factors_of_few_bits_are_multiplied_in_float32() -> None:
    left, right = rand(24, 3).bfloat16(), rand(3, 36).bfloat16()
    wide = projected(LowRank(left.double(), right.double(), 0.5), "x")
    torch.testing.assert_close(projected(LowRank(left, right, 0.5), "x"), wide, rtol=1e-5, atol=1e-5)


def test_signs_are_the_same_forever() -> None:
    drawn = int.from_bytes(hashlib.shake_256(b"rows 0 8 8 x").digest(3), "little")
    expected = [1.0 if drawn >> k & 1 else -1.0 for k in range(20)]
    assert expected[:8] == [1, 1, -1, -1, -1, -1, 1, 1]
    assert _signs("rows 0 8 8 x", 20).tolist() == expected
    assert abs(float(_signs("a", 100_000).mean())) < 4 / math.sqrt(100_000)


def estimates(a: Operator, b: Operator, keys: tuple[str, str], count: int) -> torch.Tensor:
    pairs = [(projected(a, keys[0], seed), projected(b, keys[1], seed)) for seed in range(count)]
    return torch.tensor([float((x.double() * y.double()).sum()) for x, y in pairs])


def test_inner_products_are_estimated_without_bias() -> None:
    a, b = LowRank(rand(24, 3), rand(3, 36, seed=1)), LowRank(rand(24, 2, seed=2), rand(2, 36, seed=3))
    b = sum_of([b, a * 0.5])
    truth = float((a.dense().double() * b.dense().double()).sum())
    found = estimates(a, b, ("one", "one"), 600)
    assert abs(float(found.mean()) - truth) < 4 * float(found.std()) / math.sqrt(600)
    other = estimates(a, b, ("one", "another"), 600)
    wider = (1 + SIDE / 24) * (1 + SIDE / 36)
    assert abs(float(other.mean())) < 4 * float(other.std()) / math.sqrt(600)
    expected = math.sqrt(wider) * float(torch.linalg.norm(a.dense()) * torch.linalg.norm(b.dense())) / SIDE
    assert 0.8 < float(other.std()) / expected < 1.3


def test_errors_of_places_are_uncorrelated() -> None:
    u, v = rand(64, 1), rand(1, 64, seed=1)
    op = LowRank(u / u.norm(), v / v.norm())
    squares = torch.tensor(
        [[float(projected(op, key, seed).square().sum()) for key in ("a", "b")] for seed in range(800)]
    )
    assert abs(float(squares.mean()) - 1) < 0.06
    assert abs(float(torch.corrcoef(squares.T)[0, 1])) < 4 / math.sqrt(800)
