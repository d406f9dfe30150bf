"""Local rank policies and limits, against the naive definitions."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.errors import AdapterError, UsageError
from loratools.ranks import (
    AdapterTuneElbow,
    Cumulative,
    Elbow,
    Energy,
    Fixed,
    Frobenius,
    Limits,
    LocalPolicy,
    Ratio,
    Spectrum,
    Threshold,
    allocate,
)

HARMONIC = tuple(1 / i for i in range(1, 65))

POLICIES = (
    Fixed(3),
    Energy(0.9),
    Frobenius(0.9),
    Cumulative(0.9),
    Threshold(0.1),
    Ratio(10),
    Elbow(),
    AdapterTuneElbow(noise=1e-3, samples=10),
)
SCALE_FREE = POLICIES[:-1]


def spectrum(values: Sequence[float], cost: int = 8) -> Spectrum:
    return Spectrum(tuple(values), cost, rows=64, cols=64)


def share_kept(values: Sequence[float], rank: int, power: int) -> float:
    return math.fsum(v**power for v in values[:rank]) / math.fsum(v**power for v in values)


values_lists = st.lists(st.floats(1e-6, 1e6) | st.just(0.0), min_size=1, max_size=12).map(
    lambda values: sorted(values, reverse=True)
)
nonzero_lists = values_lists.filter(lambda values: values[0] > 0)
shares = st.floats(0.01, 1)


class TestSharePolicies:
    @pytest.mark.parametrize(("share", "rank"), [(0.9, 3), (0.95, 6), (0.99, 21)])
    def test_frobenius_needs_no_rank_more_than_it_must(self, share: float, rank: int) -> None:
        # the spectrum on which an off-by-one version of sd-scripts gave 4, 7 and 22
        assert Frobenius(share).rank(spectrum(HARMONIC)) == rank

    @given(nonzero_lists, shares, st.sampled_from([(Energy, 2, 1), (Frobenius, 2, 2), (Cumulative, 1, 1)]))
    def test_rank_reaches_the_share_and_is_the_smallest(
        self, values: list[float], share: float, case: tuple[type[Energy], int, int]
    ) -> None:
        policy, power, exponent = case
        rank = policy(share).rank(spectrum(values))
        assert share_kept(values, rank, power) >= share**exponent * (1 - 1e-11)
        if rank > 1 and share < 1:
            assert share_kept(values, rank - 1, power) < share**exponent * (1 + 1e-11)

    @given(nonzero_lists, shares, shares, st.sampled_from([Energy, Frobenius, Cumulative]))
    def test_a_larger_share_never_gives_a_lower_rank(
        self, values: list[float], one: float, other: float, policy: type[Energy]
    ) -> None:
        low, high = sorted((one, other))
        assert policy(low).rank(spectrum(values)) <= policy(high).rank(spectrum(values))

    @pytest.mark.parametrize("policy", [Energy(1), Frobenius(1), Cumulative(1)])
    def test_the_whole_share_drops_only_exact_zeros(self, policy: LocalPolicy) -> None:
        assert policy.rank(spectrum((1.0, 1e-30, 1e-300, 0.0, 0.0))) == 3

    @pytest.mark.parametrize("percent", range(1, 101))
    def test_a_flat_spectrum_keeps_the_share_without_rounding_up(self, percent: int) -> None:
        assert Energy(percent / 100).rank(spectrum([7.0] * 100)) == percent

    def test_frobenius_share_is_a_share_of_the_norm(self) -> None:
        values = (4.0, 2.0, 2.0, 1.0)  # norm 5
        assert [Frobenius(share).rank(spectrum(values)) for share in (0.8, 0.81, 0.97, 0.98)] == [1, 2, 3, 4]

    @pytest.mark.parametrize("share", [0, -0.5, 1.01, 95, math.nan])
    @pytest.mark.parametrize("policy", [Energy, Frobenius, Cumulative])
    def test_shares_outside_the_unit_interval_are_refused(self, policy: type[Energy], share: float) -> None:
        with pytest.raises(UsageError, match="share"):
            policy(share)


class TestCutoffPolicies:
    @given(nonzero_lists, st.floats(0, 0.99))
    def test_threshold_is_the_count_above_it(self, values: list[float], relative: float) -> None:
        expected = sum(value / values[0] > relative for value in values)
        assert Threshold(relative).rank(spectrum(values)) == max(1, expected)

    @pytest.mark.parametrize(("ratio", "rank"), [(1, 1), (2, 2), (4, 3), (4.01, 4), (8, 4), (1e9, 5)])
    def test_ratio_cuts_strictly(self, ratio: float, rank: int) -> None:
        assert Ratio(ratio).rank(spectrum((8.0, 5.0, 3.0, 2.0, 1.0))) == rank

    @pytest.mark.parametrize("bad", [-0.1, 1, math.nan])
    def test_threshold_outside_its_range_is_refused(self, bad: float) -> None:
        with pytest.raises(UsageError, match="threshold"):
            Threshold(bad)

    @pytest.mark.parametrize("bad", [0.5, math.inf, math.nan])
    def test_ratio_outside_its_range_is_refused(self, bad: float) -> None:
        with pytest.raises(UsageError, match="ratio"):
            Ratio(bad)

    def test_fixed_rank_must_be_positive(self) -> None:
        with pytest.raises(UsageError, match="rank 0"):
            Fixed(0)


class TestElbow:
    @pytest.mark.parametrize("strong", [1, 2, 5])
    def test_finds_the_first_value_of_a_floor(self, strong: int) -> None:
        # 1, .1, .01, ... then a floor: the corner is where the floor begins
        values = [10.0**-i for i in range(strong)] + [10.0**-strong * 0.999**i for i in range(10)]
        assert Elbow().rank(spectrum(values)) == strong + 1

    def test_finds_the_last_value_before_a_cliff(self) -> None:
        assert Elbow().rank(spectrum((1.0, 0.99, 0.98, 0.97, 1e-6, 1e-7))) == 4

    @pytest.mark.parametrize("values", [[3.0], [3.0, 0.1], [2.0] * 6, [0.5**i for i in range(9)]])
    def test_keeps_everything_when_nothing_bends(self, values: list[float]) -> None:
        assert Elbow().rank(spectrum([*values, 0.0, 0.0])) == len(values)

    def test_takes_the_first_of_equally_far_points(self) -> None:
        values = [math.exp(-x) for x in (0.0, 2.0, 4.0, 4.0, 6.0, 8.0, 8.0)]
        # chord falls 4/3 a step: distances 0, 2/3, 4/3, 0, 2/3, 4/3, 0
        assert Elbow().rank(spectrum(values)) == 3

    @given(st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=12).map(lambda values: sorted(values, reverse=True)))
    def test_no_point_is_farther_from_the_chord(self, values: list[float]) -> None:
        logs = [math.log(value) for value in values]
        chord = [logs[0] + (logs[-1] - logs[0]) * i / (len(logs) - 1) for i in range(len(logs))]
        distances = [abs(a - b) for a, b in zip(logs, chord, strict=True)]
        chosen = distances[Elbow().rank(spectrum(values)) - 1]
        assert chosen >= max(distances) - 1e-7 * (1 + logs[0] - logs[-1])


class TestAdapterTuneElbow:
    @given(values_lists, st.floats(0, 10), st.integers(1, 1000))
    def test_minimises_energy_left_out_plus_estimation_error(
        self, values: list[float], noise: float, samples: int
    ) -> None:
        rank = AdapterTuneElbow(noise, samples).rank(spectrum(values))
        price = noise * 64 / samples

        def excess(k: int) -> float:
            return math.fsum(v * v for v in values[k:]) + k * price

        assert excess(rank) <= min(excess(k) for k in range(1, len(values) + 1)) * (1 + 1e-12)

    @pytest.mark.parametrize(("noise", "samples"), [(-1, 5), (math.nan, 5), (1, 0)])
    def test_impossible_parameters_are_refused(self, noise: float, samples: int) -> None:
        with pytest.raises(UsageError, match="noise"):
            AdapterTuneElbow(noise, samples)


@pytest.mark.parametrize("policy", POLICIES)
class TestEveryLocalPolicy:
    @given(values=values_lists)
    def test_stays_within_one_and_the_number_of_values(self, policy: LocalPolicy, values: list[float]) -> None:
        assert 1 <= policy.rank(spectrum(values)) <= len(values)

    @given(values=values_lists)
    def test_is_deterministic_and_pure(self, policy: LocalPolicy, values: list[float]) -> None:
        assert policy.rank(spectrum(values)) == policy.rank(spectrum(values))

    @pytest.mark.parametrize("values", [(2.0,), (0.0,), (2.0, 1.0), (2.0, 2.0), (2.0, 0.0), (2.0, 1e-12)])
    def test_answers_for_one_or_two_values(self, policy: LocalPolicy, values: tuple[float, ...]) -> None:
        assert 1 <= policy.rank(spectrum(values)) <= len(values)

    def test_keeps_one_rank_of_an_untrained_target(self, policy: LocalPolicy) -> None:
        assert policy.rank(spectrum([0.0] * 5)) == (3 if isinstance(policy, Fixed) else 1)


@pytest.mark.parametrize("policy", SCALE_FREE)
@given(values=values_lists, exponent=st.integers(-20, 20))
def test_choice_does_not_depend_on_the_scale(policy: LocalPolicy, values: list[float], exponent: int) -> None:
    scaled = [value * 2.0**exponent for value in values]
    assert policy.rank(spectrum(scaled)) == policy.rank(spectrum(values))


class TestSpectrum:
    @pytest.mark.parametrize("values", [(), (1.0, 2.0), (math.nan,), (math.inf, 1.0), (1.0, -1.0), (1e200,)])
    def test_refuses_what_is_no_spectrum(self, values: tuple[float, ...]) -> None:
        with pytest.raises(AdapterError):
            spectrum(values)

    @pytest.mark.parametrize("cost", [0, -4, 2.5, math.nan])
    def test_refuses_a_cost_that_is_not_whole_bytes(self, cost: float) -> None:
        with pytest.raises(AdapterError, match="bytes"):
            Spectrum((1.0,), cost, rows=1, cols=1)  # type: ignore[arg-type]

    @given(st.lists(values_lists, min_size=1, max_size=4))
    def test_pooled_error_is_the_sum_over_the_blocks(self, blocks: list[list[float]]) -> None:
        pooled = Spectrum.pooled(blocks, 8, rows=4, cols=4)
        assert len(pooled.values) == max(map(len, blocks))
        for rank in range(1, len(pooled.values) + 1):
            expected = math.fsum(v * v for block in blocks for v in block[rank:])
            assert pooled.error_at(rank) == pytest.approx(expected, rel=1e-12)

    def test_energy_of_blocks_is_pooled_before_the_share_is_taken(self) -> None:
        blocks = [(3.0, 0.0, 0.0), (1.0, 1.0, 1.0)]  # energy by rank 10, 11, 12
        assert [Energy(s).rank(Spectrum.pooled(blocks, 8, rows=6, cols=6)) for s in (0.8, 0.9, 0.95)] == [1, 2, 3]


class TestLimits:
    @given(
        minimum=st.integers(1, 9),
        extra=st.integers(0, 12) | st.none(),
        multiple=st.integers(1, 6),
        rank=st.integers(1, 20),
        n_values=st.integers(1, 20),
    )
    def test_fit_is_the_lowest_allowed_rank_not_below(
        self, minimum: int, extra: int | None, multiple: int, rank: int, n_values: int
    ) -> None:
        maximum = None if extra is None else minimum + multiple + extra
        limits = Limits(minimum, maximum, multiple)
        ceiling = min(n_values, n_values if maximum is None else maximum)
        allowed = [
            k
            for k in range(1, ceiling + 1)
            if (k % multiple == 0 and k >= minimum) or k == n_values  # all there is, is always allowed
        ]
        assert limits.rungs(n_values) == allowed
        assert limits.fit(rank, n_values) == min([k for k in allowed if k >= rank], default=max(allowed))

    @pytest.mark.parametrize(
        ("n_values", "rank", "expected"), [(64, 9, 12), (64, 12, 12), (10, 9, 10), (3, 1, 3), (64, 63, 64)]
    )
    def test_multiples_round_up_to_what_there_is(self, n_values: int, rank: int, expected: int) -> None:
        assert Limits(multiple_of=4).fit(rank, n_values) == expected

    def test_maximum_wins_over_rounding_up(self) -> None:
        assert Limits(maximum=10, multiple_of=4).fit(9, 64) == 8

    @pytest.mark.parametrize(
        ("minimum", "maximum", "multiple"), [(0, None, 1), (1, None, 0), (5, 4, 1), (1, 3, 4), (5, 7, 4)]
    )
    def test_contradictions_are_refused(self, minimum: int, maximum: int | None, multiple: int) -> None:
        with pytest.raises(UsageError):
            Limits(minimum, maximum, multiple)


class TestAllocate:
    def test_sums_errors_and_bytes(self) -> None:
        spectra = {
            "q": Spectrum((3.0, 2.0, 1.0), 10, rows=2, cols=3, fixed_cost=7),
            "k": Spectrum((1.0, 0.0), 20, rows=2, cols=3),
        }
        found = allocate(spectra, Fixed(2))
        assert (found.ranks, found.squared_error, found.bytes, found.optimality_gap) == ({"q": 2, "k": 2}, 1.0, 67, 0)

    def test_uniform_takes_the_highest_choice_capped_at_each_target(self) -> None:
        spectra = {"long": spectrum(HARMONIC), "flat": spectrum([1.0] * 10), "short": spectrum([1.0] * 3)}
        assert allocate(spectra, Energy(0.9)).ranks == {"long": 6, "flat": 9, "short": 3}
        assert allocate(spectra, Energy(0.9), Limits(uniform=True)).ranks == {"long": 9, "flat": 9, "short": 3}
        assert allocate(spectra, Energy(0.9), Limits(multiple_of=4, uniform=True)).ranks == {
            "long": 12,
            "flat": 10,
            "short": 3,
        }

    def test_no_targets_no_ranks(self) -> None:
        assert allocate({}, Elbow(), Limits(uniform=True)).ranks == {}


def test_choosing_ranks_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, loratools.ranks; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
