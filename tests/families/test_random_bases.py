"""VeRA and RandLoRA: planted members are found, sums are least squares, sizes and energies are those that are told."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.errors import UsageError
from loratools.families import RandLoRA, VeRA
from loratools.families.base import Layout
from loratools.families.fitting import Fittable, Source
from loratools.families.randlora import RandLoRAOptions, drawn
from loratools.families.random_projections import Projections
from loratools.families.vera import VeRAOptions
from loratools.linalg.inner import relative_error
from loratools.operators import Dense, LowRank, Operator


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(delta: Operator, seed: int = 3) -> Source:
    return Source(delta, Layout(shape=delta.shape), None, torch.float64, seed)


def loss(delta: Operator, update: Fittable) -> float:
    return relative_error(delta, update.operator().to(torch.float64))


def vera(m: int, n: int, rank: int) -> VeRA:
    projections = Projections(rank, rank, None, 3, (m, n), exact=True)
    return VeRA(rand(1, m), rand(2, rank), projections, 1.0, Layout(shape=(m, n)))


def randlora(m: int, n: int, rank: int, draw: str = "dense") -> RandLoRA:
    short, count = min(m, n), math.ceil(min(m, n) / rank)
    return RandLoRA(
        rand(1, rank, count),
        rand(2, count, short),
        None,
        3,
        draw,
        (m, n),
        1.0,
        Layout(shape=(m, n)),  # type: ignore[arg-type]
    )


PLANTED: dict[str, tuple[Fittable, object]] = {
    "vera, few rows": (vera(24, 16, 4), VeRAOptions(4)),
    "vera, as many rows as columns": (vera(24, 16, 16), VeRAOptions(16)),
    "vera, wide": (vera(40, 90, 30), VeRAOptions(30)),
    "randlora, tall": (randlora(64, 40, 10), RandLoRAOptions(10)),
    "randlora, wide": (randlora(32, 90, 8), RandLoRAOptions(8)),
    "randlora, a rank that does not divide": (randlora(80, 47, 9), RandLoRAOptions(9)),
    "randlora, sparse": (randlora(90, 40, 10, "sparse"), RandLoRAOptions(10, "sparse", 60)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_member_is_found(name: str) -> None:
    member, options = PLANTED[name]
    delta = member.operator().to(torch.float64)
    assert loss(delta, type(member).encode(source(delta), options)) < 1e-6


@pytest.mark.parametrize("name", PLANTED)
def test_no_small_change_brings_it_nearer(name: str) -> None:
    """The best step along the gradient in either slot gains next to nothing of what is captured."""
    member, options = PLANTED[name]
    delta = rand(5, *member.layout.shape or ())
    found = type(member).encode(source(Dense(delta)), options)
    rest = delta - found.operator().dense()
    captured = float(delta.square().sum() - rest.square().sum())
    for slot, tensor in found.parameters().items():
        numbers = tensor.clone().requires_grad_()
        made = found.with_tensors({slot: numbers}).operator().dense()
        (slope,) = torch.autograd.grad((rest * made).sum(), numbers)
        step = found.with_tensors({slot: slope}).operator().dense()  # the delta is linear in each slot
        gain = float((rest * step).sum() ** 2 / step.square().sum().clamp_min(1e-300))
        assert gain < 5e-3 * captured, slot


def test_vera_is_the_sum_of_its_terms() -> None:
    """Targets of one adapter cut the same draw, as large as the largest of them."""
    sources = {"a": source(LowRank(rand(0, 6, 2), rand(1, 2, 9))), "b": source(LowRank(rand(2, 8, 2), rand(3, 2, 5)))}
    found = VeRA.encode_together(sources, VeRAOptions(4))
    draw = torch.Generator().manual_seed(3)
    a, b = (
        torch.empty(shape).uniform_(-math.sqrt(6 / shape[1]), math.sqrt(6 / shape[1]), generator=draw).double().numpy()
        for shape in ((4, 9), (8, 4))
    )
    for target, update in found.items():
        (m, n), outer, inner = sources[target].shape, update.lambda_b.numpy(), update.lambda_d.numpy()
        wanted = sum(np.outer(outer * b[:m, k], inner[k] * a[k, :n]) for k in range(4))
        np.testing.assert_allclose(update.operator().dense().numpy(), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("m", "n"), [(7, 12), (12, 7)])
def test_randlora_is_the_sum_of_its_terms(m: int, n: int) -> None:
    delta = LowRank(rand(0, m, 2), rand(1, 2, n))
    update = RandLoRA.encode(source(delta), RandLoRAOptions(3))
    a, b = (t.double().numpy() for t in drawn(3, 12, 7, 3, "dense"))
    left, right = update.left.numpy(), update.right.numpy()
    assert (left.shape, right.shape) == ((3, 3), (3, 7))
    tall = sum(np.outer(b[:, p // 3, p % 3], left[p // 3, p % 3] * a[p // 3, 0] * right[p % 3]) for p in range(9))
    np.testing.assert_allclose(update.operator().dense().numpy(), tall if m > n else tall.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", [VeRA, RandLoRA])
def test_numbers_are_counted(family: type[Fittable]) -> None:
    (m, n), rank = (20, 12), 5
    options = family.Options(rank=rank)
    held = sum(t.numel() for t in family.encode(source(Dense(rand(0, m, n))), options).parameters().values())
    assert held == (m + rank if family is VeRA else 3 * (rank + 12))


@pytest.mark.parametrize("family", [VeRA, RandLoRA])
def test_a_generic_delta_keeps_about_the_share_that_is_expected(family: type[Fittable]) -> None:
    """A little more, for the numbers multiply: what is told is no promise that a fit breaks."""
    given, options = source(Dense(rand(0, 120, 80))), family.Options(rank=16)
    kept, expected = 1 - loss(given.delta, family.encode(given, options)) ** 2, family.expected_energy(given, options)
    assert expected is not None
    assert expected < kept < 2.5 * expected


@pytest.mark.parametrize("family", [VeRA, RandLoRA])
def test_all_targets_have_one_rank_and_are_in_the_budget(family: type[Fittable]) -> None:
    sources = {"a": source(Dense(rand(0, 30, 20))), "b": source(Dense(rand(1, 12, 25)))}
    for budget in (1600, 2500, 6000):
        options = family.within_together(sources, budget)
        assert len(set(options.values())) == 1
        found = family.encode_together(sources, options["a"])
        assert sum(t.nbytes for update in found.values() for t in update.parameters().values()) <= budget
    with pytest.raises(UsageError, match="too small"):
        family.within_together(sources, 100)


@pytest.mark.parametrize(
    ("family", "options", "problem"),
    [
        (VeRA, VeRAOptions(0), "a rank of 0"),
        (RandLoRA, RandLoRAOptions(99), "not between 1 and 12"),
        (RandLoRA, RandLoRAOptions(4, "thin"), "draw is 'thin'"),
    ],
)
def test_what_has_no_bases_is_refused(family: type[Fittable], options: object, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        family.encode(source(Dense(rand(0, 20, 12))), options)
