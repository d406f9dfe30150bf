"""Uni-LoRA: one vector for all targets, planted ones found, sizes and energies as told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratools.errors import AdapterError, UsageError
from loratools.families import UniLoRA, family_of
from loratools.families.base import Layout
from loratools.families.fitting import Source
from loratools.families.unilora import UniLoRAOptions, drawn
from loratools.linalg.inner import relative_error
from loratools.operators import Dense, LowRank, Operator
from loratools.storage.base import TensorSpec

SHAPES = {"a": (24, 16), "b": (30, 20), "c": (24, 16)}
SIDES = sum(m + n for m, n in SHAPES.values())


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sources(deltas: dict[str, Operator]) -> dict[str, Source]:
    return {t: Source(delta, Layout(shape=delta.shape), None, torch.float64, 5) for t, delta in deltas.items()}


def low_rank(rank: int) -> dict[str, Source]:
    return sources({t: LowRank(rand(i, m, rank), rand(i + 9, rank, n)) for i, (t, (m, n)) in enumerate(SHAPES.items())})


def energy(given: dict[str, Source], found: dict[str, UniLoRA]) -> float:
    lost = sum(float((s.delta.dense() - found[t].operator().dense()).square().sum()) for t, s in given.items())
    return 1 - lost / sum(float(s.delta.dense().square().sum()) for s in given.values())


@pytest.mark.parametrize("repeats", [1, 2, 5])
def test_a_planted_vector_is_found(repeats: int) -> None:
    total = 3 * SIDES
    theta = rand(1, total // repeats)
    members, start = {}, 0
    for target, (m, n) in SHAPES.items():
        place = {"unilora_place": torch.tensor([start, 3])}
        members[target] = UniLoRA(place, theta, 1.0, Layout(shape=(m, n)), 5, total)
        start += 3 * (m + n)
    given = sources({t: member.operator() for t, member in members.items()})
    found = UniLoRA.encode_together(given, UniLoRAOptions(3, repeats))
    for target, source in given.items():
        assert relative_error(source.delta, found[target].operator()) < 1e-6


def test_the_projection_keeps_lengths() -> None:
    """Its columns are orthonormal, where no number is left unused."""
    indices, scales = drawn(100, 7, 3)
    spread = torch.zeros(100, 7, dtype=torch.float64)
    spread[torch.arange(100), indices] = scales[indices]
    torch.testing.assert_close(spread.T @ spread, torch.eye(7, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_the_vector_is_stored_once_and_is_in_the_budget() -> None:
    given = low_rank(6)
    for numbers in (40, SIDES - 1, SIDES, 2 * SIDES + 50, 4000):
        budget = 8 * numbers + 48
        options = UniLoRA.within_together(given, budget)["a"]
        found = UniLoRA.encode_together(given, options)
        assert len({id(update.theta) for update in found.values()}) == 1
        places = sum(t.nbytes for update in found.values() for t in update.parameters().values())
        assert places + found["a"].theta.nbytes <= budget
        assert len(found["a"].theta) == options.rank * SIDES // options.repeats
        if numbers >= SIDES:  # whole factors: no worse than the best of that rank
            assert (options.rank, options.repeats) == (min(numbers // SIDES, 20), 1)
            best = sum(
                float(torch.linalg.svdvals(s.delta.dense())[: options.rank].square().sum()) for s in given.values()
            )
            whole = sum(float(s.delta.dense().square().sum()) for s in given.values())
            assert energy(given, found) > best / whole - 1e-9
    with pytest.raises(UsageError, match="too small"):
        UniLoRA.within_together(given, 50)


@pytest.mark.parametrize("repeats", [1, 4])
def test_a_generic_delta_keeps_about_the_share_that_is_expected(repeats: int) -> None:
    given = sources({t: Dense(rand(i, m, n)) for i, (t, (m, n)) in enumerate(SHAPES.items())})
    options = UniLoRAOptions(2, repeats)
    expected = UniLoRA.expected_energy(given["a"], options)
    assert expected == pytest.approx(2 * 40 / repeats / (24 * 16))
    assert 0.5 * expected < energy(given, UniLoRA.encode_together(given, options)) < 3 * expected


def test_no_small_change_brings_it_nearer() -> None:
    given = low_rank(3)
    found = UniLoRA.encode_together(given, UniLoRAOptions(2, 4))
    theta = found["a"].theta.clone().requires_grad_()
    lost = torch.zeros((), dtype=torch.float64)
    for target, source in given.items():
        moved = UniLoRA(found[target].tensors, theta, 1.0, found[target].layout, 5, found[target].total)
        lost = lost + (source.delta.dense() - moved.operator().dense()).square().sum()
    (slope,) = torch.autograd.grad(lost, theta)
    assert float(slope.norm() * theta.detach().norm()) < 1e-4 * float(lost.detach())


def test_a_place_beyond_the_entries_is_refused() -> None:
    place = {"unilora_place": torch.tensor([90, 2])}
    update = UniLoRA(place, rand(0, 10), 1.0, Layout(shape=(6, 4)), 0, 100)
    with pytest.raises(AdapterError, match="names entries that its 100 do not have"):
        update.operator()
    with pytest.raises(AdapterError, match="is not the vector"):
        UniLoRA.from_parameters(
            place | {"unilora_theta_d": rand(0, 10)}, scale=1.0, layout=Layout(), settings={"seed": 0, "length": 9}
        )


def test_either_set_of_slots_is_the_family_and_no_slots_are_none() -> None:
    four = {f"unilora_{kind}_{side}" for kind in ("indices", "scales") for side in "AB"}
    assert family_of({"unilora_place"}) is family_of(four) is UniLoRA
    specs = {slot: TensorSpec("I64", (2, 3)) for slot in four}
    assert UniLoRA.check({"unilora_place": TensorSpec("I64", (2,))}, Layout()) is None
    for broken in (four - {"unilora_scales_B"}, four | {"unilora_place"}):
        found = UniLoRA.check({slot: specs.get(slot, TensorSpec("I64", (2,))) for slot in broken}, Layout())
        assert found is not None
    with pytest.raises(AdapterError, match="not a complete"):
        family_of(set())
