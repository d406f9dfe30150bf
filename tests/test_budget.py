"""The byte budget, against brute force, an exact table over all capacities, and plain greedy."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.budget import Chain, buy
from loratools.errors import AdapterError, NeedsBaseError, UsageError
from loratools.ranks import Allocation, Budget, Fixed, Limits, Spectrum, allocate

Spectra = dict[str, Spectrum]


@st.composite
def spectra_of(draw: st.DrawFn, costs: st.SearchStrategy[int], most: int = 4) -> Spectra:
    value = st.sampled_from([0.0, 1.0, 2.0, 3.0]) | st.floats(1e-3, 10)
    spectra = {}
    for index in range(draw(st.integers(1, most))):
        values = sorted(draw(st.lists(value, min_size=1, max_size=5)), reverse=True)
        spectra[f"layer{index}"] = Spectrum(
            tuple(values),
            draw(costs),
            rows=8,
            cols=8,
            fixed_cost=draw(st.integers(0, 5)),
            base_norm=draw(st.floats(0.1, 10)),
        )
    return spectra


def brute_force(spectra: Mapping[str, Spectrum], budget: Budget, limits: Limits) -> float | None:
    """The least objective over all rank vectors, or None when none fits."""
    best = None
    ladders = [limits.rungs(len(s.values)) for s in spectra.values()]
    for ranks in itertools.product(*ladders):
        pairs = list(zip(spectra.values(), ranks, strict=True))
        if sum(s.bytes_at(k) for s, k in pairs) <= budget.bytes_:
            objective = math.fsum(weight(s, budget) * s.error_at(k) for s, k in pairs)
            best = objective if best is None else min(best, objective)
    return best


def weight(spectrum: Spectrum, budget: Budget) -> float:
    if budget.relative_to == "base":
        assert spectrum.base_norm is not None
        return 1 / spectrum.base_norm**2
    if budget.relative_to == "self":
        return 1 / spectrum.error_at(0) if spectrum.error_at(0) else 0.0
    return 1.0


def check_respects(found: Allocation, spectra: Spectra, budget: Budget, limits: Limits) -> None:
    assert found.bytes == sum(spectra[name].bytes_at(rank) for name, rank in found.ranks.items()) <= budget.bytes_
    assert all(rank in limits.rungs(len(spectra[name].values)) for name, rank in found.ranks.items())
    expected = math.fsum(weight(spectra[name], budget) * spectra[name].error_at(k) for name, k in found.ranks.items())
    assert found.squared_error == pytest.approx(expected, rel=1e-12)


mixed = spectra_of(st.sampled_from([3, 5, 7]) | st.integers(1, 40))


@settings(max_examples=400, deadline=None)
@given(mixed, st.integers(1, 400), st.sampled_from([None, "base", "self"]), st.integers(1, 3), st.integers(1, 3))
def test_is_the_optimum_of_all_rank_vectors(
    spectra: Spectra, size: int, relative_to: object, multiple: int, minimum: int
) -> None:
    budget = Budget(size, relative_to)  # type: ignore[arg-type]
    limits = Limits(minimum=minimum, multiple_of=multiple)
    best = brute_force(spectra, budget, limits)
    if best is None:
        with pytest.raises(UsageError, match="too small"):
            allocate(spectra, budget, limits)
        return
    found = allocate(spectra, budget, limits)
    check_respects(found, spectra, budget, limits)
    assert found.optimality_gap == 0
    assert found.squared_error == pytest.approx(best, rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(mixed, st.integers(1, 400), st.integers(0, 100))
def test_more_bytes_never_mean_more_error(spectra: Spectra, size: int, more: int) -> None:
    size = max(size, allocate(spectra, Fixed(1)).bytes)
    small, large = allocate(spectra, Budget(size)), allocate(spectra, Budget(size + more))
    assert large.squared_error <= small.squared_error * (1 + 1e-12) + 1e-12


@settings(deadline=None)
@given(spectra_of(st.just(8), most=6), st.integers(0, 250))
def test_is_greedy_where_all_ranks_cost_the_same(spectra: Spectra, spare: int) -> None:
    least = allocate(spectra, Fixed(1)).bytes
    pool = sorted((value**2 for s in spectra.values() for value in s.values[1:]), reverse=True)
    left_out = math.fsum(pool[spare // 8 :])
    found = allocate(spectra, Budget(least + spare))
    assert found.squared_error == pytest.approx(left_out, rel=1e-12, abs=1e-12)


def table(chains: list[Chain], capacity: int) -> float:
    """The best gain by the textbook recursion over chains and capacities."""
    best = [0.0] * (capacity + 1)
    for chain in chains:
        longer = list(best)
        gain, cost = 0.0, 0
        for step_gain, step_cost in chain:
            gain, cost = gain + step_gain, cost + step_cost
            for size in range(cost, capacity + 1):
                longer[size] = max(longer[size], best[size - cost] + gain)
        best = longer
    return best[capacity]


def some_chains(rng: random.Random, count: int) -> list[Chain]:
    """Chains of every kind: own or shared costs, ties, gains in proportion to cost, a shorter last step."""
    kind = rng.choice(("spread", "tied", "flat"))
    chains: list[Chain] = []
    for _ in range(count):
        cost = rng.choice((2, 3, 5, 8, 13)) if rng.random() < 0.5 else rng.randint(1, 40)
        steps = []
        for _ in range(rng.randint(0, 8)):
            gain = {"spread": rng.random() ** 3, "tied": rng.randint(1, 4) / 4, "flat": 1.0}[kind]
            steps.append((gain * (cost if kind == "flat" else 1), cost))
        steps.sort(reverse=True)
        if steps and cost > 1 and rng.random() < 0.3:
            part = rng.randint(1, cost - 1)
            steps.append((steps[-1][0] * part / cost * rng.random(), part))
        chains.append(steps)
    return chains


@pytest.mark.parametrize("seed", range(60))
def test_knapsack_matches_the_table_of_all_capacities(seed: int) -> None:
    rng = random.Random(seed)
    chains = some_chains(rng, rng.randint(1, 25))
    capacity = rng.randint(0, max(1, sum(cost for chain in chains for _, cost in chain)))
    bought = buy(chains, capacity)
    taken = [step for chain, level in zip(chains, bought.levels, strict=True) for step in chain[:level]]
    assert bought.gap == 0
    assert sum(cost for _, cost in taken) <= capacity
    assert math.fsum(gain for gain, _ in taken) == pytest.approx(table(chains, capacity), rel=1e-9)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("most_work", [0, 10, 100])
def test_a_search_cut_short_certifies_how_far_it_can_be_off(seed: int, most_work: int) -> None:
    rng = random.Random(seed)
    chains = some_chains(rng, 15)
    capacity = rng.randint(0, sum(cost for chain in chains for _, cost in chain))
    bought = buy(chains, capacity, most_work=most_work)
    taken = [step for chain, level in zip(chains, bought.levels, strict=True) for step in chain[:level]]
    assert sum(cost for _, cost in taken) <= capacity
    assert math.fsum(gain for gain, _ in taken) >= table(chains, capacity) - bought.gap - 1e-9


def test_last_bytes_are_not_left_to_greed() -> None:
    # by density "wide" comes first (16/10 against 9/6) and leaves 2 bytes unused; two steps of "thin" use them all
    spectra = {
        "wide": Spectrum((5.0, 4.0), 10, rows=4, cols=6),
        "thin": Spectrum((5.0, 3.0, 3.0), 6, rows=3, cols=3),
    }
    found = allocate(spectra, Budget(16 + 12))
    assert found.ranks == {"wide": 1, "thin": 3}
    assert (found.squared_error, found.bytes, found.optimality_gap) == (16, 28, 0)


def test_no_bytes_are_spent_on_zeros() -> None:
    spectra = {"a": Spectrum((1.0, 0.0, 0.0), 4, rows=3, cols=3), "b": Spectrum((0.0, 0.0), 4, rows=2, cols=2)}
    assert allocate(spectra, Budget(10**6)).ranks == {"a": 1, "b": 1}
    assert allocate(spectra, Budget(10**6), Limits(uniform=True)).ranks == {"a": 1, "b": 1}


@settings(deadline=None)
@given(mixed, st.integers(1, 400), st.integers(1, 3))
def test_uniform_is_the_largest_common_rank_that_fits(spectra: Spectra, size: int, multiple: int) -> None:
    limits = Limits(multiple_of=multiple, uniform=True)
    common = [
        [min(rung, len(s.values)) for s in spectra.values()]
        for rung in limits.rungs(max(len(s.values) for s in spectra.values()))
    ]
    sizes = [sum(s.bytes_at(k) for s, k in zip(spectra.values(), ranks, strict=True)) for ranks in common]
    if sizes[0] > size:
        with pytest.raises(UsageError, match=str(sizes[0])):
            allocate(spectra, Budget(size), limits)
        return
    fitting = [ranks for ranks, needed in zip(common, sizes, strict=True) if needed <= size]
    found = allocate(spectra, Budget(size), limits)
    errors = [
        math.fsum(s.error_at(k) for s, k in zip(spectra.values(), ranks, strict=True)) for ranks in (fitting[-1],)
    ]
    assert list(found.ranks.values()) in fitting
    assert found.squared_error == pytest.approx(errors[0], rel=1e-12)


@given(st.lists(st.lists(st.floats(0.01, 10), min_size=4, max_size=4), min_size=1, max_size=3), st.integers(0, 120))
def test_blocks_share_one_rank_and_the_optimum_sums_over_them(blocks: list[list[float]], spare: int) -> None:
    ordered = [sorted(block, reverse=True) for block in blocks]
    spectra = {
        "experts": Spectrum.pooled(ordered, 7 * len(blocks), rows=8, cols=8),
        "dense": Spectrum((4.0, 2.0, 1.0), 11, rows=8, cols=8),
    }
    size = allocate(spectra, Fixed(1)).bytes + spare
    best = min(
        math.fsum(v * v for block in ordered for v in block[k:]) + spectra["dense"].error_at(j)
        for k in range(1, 5)
        for j in range(1, 4)
        if 7 * len(blocks) * k + 11 * j <= size
    )
    assert allocate(spectra, Budget(size)).squared_error == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_relative_errors_move_bytes_to_the_small_target() -> None:
    spectra = {
        "large": Spectrum((10.0, 9.0), 4, rows=2, cols=2, base_norm=1000.0),
        "small": Spectrum((1.0, 0.9), 4, rows=2, cols=2, base_norm=1.0),
    }
    assert allocate(spectra, Budget(12)).ranks == {"large": 2, "small": 1}
    assert allocate(spectra, Budget(12, relative_to="base")).ranks == {"large": 1, "small": 2}
    found = allocate(spectra, Budget(8, relative_to="self"))
    assert found.squared_error == pytest.approx(2 * 0.81 / 1.81)


def test_too_small_a_budget_names_the_least() -> None:
    spectra = {name: Spectrum((1.0,) * 8, 512, rows=4, cols=4, fixed_cost=8) for name in "abc"}
    least = 3 * (8 + 4 * 512)
    with pytest.raises(UsageError, match=f"{least} bytes"):
        allocate(spectra, Budget(least - 1), Limits(minimum=4))
    assert allocate(spectra, Budget(least), Limits(minimum=4)).bytes == least
    with pytest.raises(UsageError, match="holds nothing"):
        Budget(0)


def test_weights_by_the_base_need_the_base() -> None:
    with pytest.raises(NeedsBaseError, match="q_proj"):
        allocate({"q_proj": Spectrum((1.0,), 4, rows=1, cols=1)}, Budget(9, relative_to="base"))
    with pytest.raises(AdapterError, match="q_proj"):
        allocate({"q_proj": Spectrum((1.0,), 4, rows=1, cols=1, base_norm=0.0)}, Budget(9, relative_to="base"))


def test_an_empty_adapter_has_an_empty_allocation() -> None:
    assert allocate({}, Budget(1)) == Allocation({}, 0.0, 0)


@pytest.mark.parametrize("costs", [(16384, 10240, 36864), tuple(range(3001, 3998, 7))])
def test_a_thousand_targets_of_64_ranks(costs: tuple[int, ...]) -> None:
    rng = random.Random(1)
    spectra = {}
    for index in range(1000):
        top, power = rng.uniform(0.5, 2), rng.uniform(0.5, 1.3)
        values = tuple(top * i**-power for i in range(1, 65))
        spectra[f"layers.{index}"] = Spectrum(values, rng.choice(costs), rows=64, cols=64)
    budget = Budget(allocate(spectra, Fixed(16)).bytes)
    found = allocate(spectra, budget)
    check_respects(found, spectra, budget, Limits())
    # 143 costs are far more than any model has; there the proof may stop short, but never far
    assert found.optimality_gap <= (0 if len(costs) < 10 else 1e-5 * found.squared_error)
    assert found.squared_error < allocate(spectra, budget, Limits(uniform=True)).squared_error
