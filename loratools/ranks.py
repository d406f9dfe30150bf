"""Rank policies: from the spectra of an adapter's targets to one rank for each, without touching a tensor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate, pairwise, zip_longest
from typing import Literal, TypeAlias, final

from loratools.budget import Step, buy
from loratools.errors import AdapterError, NeedsBaseError, UsageError
from loratools.sizes import format_size

_ROUNDING = 1e-12  # a share is reached when it is missed by less than this: 0.07 * 100 is 7.000000000000001


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one target's delta, scale included and largest first, and what each rank costs on disk."""

    values: tuple[float, ...]
    cost_per_rank: int  # bytes
    _: KW_ONLY
    rows: int
    cols: int
    fixed_cost: int = 0  # bytes, whatever the rank
    base_norm: float | None = None  # Frobenius norm of the base weight

    def __post_init__(self) -> None:
        if not self.values:
            raise AdapterError("a spectrum needs at least one singular value")
        if not all(0 <= value < math.inf for value in self.values):
            raise AdapterError("a spectrum holds NaN, infinite or negative singular values")
        if any(after > before for before, after in pairwise(self.values)):
            raise AdapterError("a spectrum must list its singular values from the largest to the smallest")
        if self.values[0] > 1e150:
            raise AdapterError(f"a singular value of {self.values[0]:.3g} is too large to square")
        if not (self.cost_per_rank >= 1 and self.cost_per_rank % 1 == 0):
            raise AdapterError(f"a rank costs a whole number of bytes, at least 1, not {self.cost_per_rank}")
        if not (self.fixed_cost >= 0 and self.fixed_cost % 1 == 0):
            raise AdapterError(f"the fixed cost is a whole number of bytes, not {self.fixed_cost}")

    @classmethod
    def pooled(
        cls,
        blocks: Sequence[Sequence[float]],
        cost_per_rank: int,
        *,
        rows: int,
        cols: int,
        fixed_cost: int = 0,
        base_norm: float | None = None,
    ) -> Spectrum:
        """One spectrum for blocks (experts, groups) that share their rank: value i is the root of sum_b sigma_{b,i}^2.

        The squared error at rank k is then the sum over the blocks; sizes and costs are those of all blocks together.
        """
        values = tuple(math.hypot(*column) for column in zip_longest(*blocks, fillvalue=0.0))
        return cls(values, cost_per_rank, rows=rows, cols=cols, fixed_cost=fixed_cost, base_norm=base_norm)

    def error_at(self, rank: int) -> float:
        """The least squared Frobenius error of any approximation of this rank (Eckart and Young 1936)."""
        return math.fsum(value * value for value in self.values[rank:])

    def bytes_at(self, rank: int) -> int:
        return int(self.fixed_cost + rank * self.cost_per_rank)

    def relative(self) -> list[float]:
        """The values divided by the largest: what makes a choice independent of the scale."""
        top = self.values[0] or 1.0
        return [value / top for value in self.values]

    def n_nonzero(self) -> int:
        return sum(value > 0 for value in self.values)


@dataclass(frozen=True)
class Limits:
    """What every chosen rank must respect: at least `minimum`, at most `maximum`, and a multiple, or all that there is.

    Choices are rounded up, to all values where a target has fewer than the next multiple; `uniform` makes one rank
    common to all targets, and only those with fewer values stay below it.
    """

    minimum: int = 1
    maximum: int | None = None
    multiple_of: int = 1
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.minimum < 1 or self.multiple_of < 1:
            raise UsageError(f"minimum {self.minimum} and multiple {self.multiple_of} must both be at least 1")
        least = -(-self.minimum // self.multiple_of) * self.multiple_of
        if self.maximum is not None and least > self.maximum:
            raise UsageError(
                f"no rank is a multiple of {self.multiple_of} between {self.minimum} and {self.maximum}: "
                f"allow a maximum of {least}"
            )

    def rungs(self, n_values: int) -> list[int]:
        """The ranks allowed to a target with this many values, lowest first; never empty."""
        top = n_values if self.maximum is None else min(n_values, self.maximum)
        first = -(-self.minimum // self.multiple_of) * self.multiple_of
        rungs = list(range(first, top + 1, self.multiple_of))
        if top == n_values and n_values not in rungs[-1:]:
            rungs.append(n_values)
        return rungs

    def fit(self, rank: int, n_values: int) -> int:
        """The lowest allowed rank that is not below `rank`, or else the highest."""
        rungs = self.rungs(n_values)
        return next((rung for rung in rungs if rung >= rank), rungs[-1])


class LocalPolicy(ABC):
    """A rule that picks the rank of one target from its spectrum alone."""

    @abstractmethod
    def rank(self, spectrum: Spectrum) -> int:
        """From 1 to the number of values; 1 when they are all zero."""


@final
@dataclass(frozen=True)
class Fixed(LocalPolicy):
    """The same rank everywhere, or all of a target's values where it has fewer."""

    value: int

    def __post_init__(self) -> None:
        if self.value < 1:
            raise UsageError(f"rank {self.value} is below 1")

    def rank(self, spectrum: Spectrum) -> int:
        return min(self.value, len(spectrum.values))


@final
@dataclass(frozen=True)
class Energy(LocalPolicy):
    """The smallest rank k with sum_{i<=k} sigma_i^2 >= share * sum_i sigma_i^2."""

    share: float

    def __post_init__(self) -> None:
        _check_share(self.share)

    def rank(self, spectrum: Spectrum) -> int:
        return _least_rank(spectrum, self.share, lambda value: value * value)


@final
@dataclass(frozen=True)
class Frobenius(LocalPolicy):
    """The smallest rank that keeps this share of the Frobenius norm: sd-scripts' sv_fro, and Energy(share ** 2)."""

    share: float

    def __post_init__(self) -> None:
        _check_share(self.share)

    def rank(self, spectrum: Spectrum) -> int:
        return _least_rank(spectrum, self.share**2, lambda value: value * value)


@final
@dataclass(frozen=True)
class Cumulative(LocalPolicy):
    """The smallest rank k with sum_{i<=k} sigma_i >= share * sum_i sigma_i: sd-scripts' sv_cumulative."""

    share: float

    def __post_init__(self) -> None:
        _check_share(self.share)

    def rank(self, spectrum: Spectrum) -> int:
        return _least_rank(spectrum, self.share, lambda value: value)


@final
@dataclass(frozen=True)
class Threshold(LocalPolicy):
    """Keeps the values with sigma_i > relative * sigma_1."""

    relative: float

    def __post_init__(self) -> None:
        if not 0 <= self.relative < 1:
            raise UsageError(f"threshold {self.relative} is not in [0, 1): as a share of the largest value, try 0.05")

    def rank(self, spectrum: Spectrum) -> int:
        return max(1, sum(value > self.relative for value in spectrum.relative()))


@final
@dataclass(frozen=True)
class Ratio(LocalPolicy):
    """Keeps the values with sigma_i > sigma_1 / ratio, strictly: sd-scripts' sv_ratio."""

    ratio: float

    def __post_init__(self) -> None:
        if not 1 <= self.ratio < math.inf:
            raise UsageError(f"ratio {self.ratio} is below 1 or not finite: it is sigma_1 / sigma_k, try 20")

    def rank(self, spectrum: Spectrum) -> int:
        return max(1, sum(value > 1 / self.ratio for value in spectrum.relative()))


@final
@dataclass(frozen=True)
class Elbow(LocalPolicy):
    """The point of log sigma_i farthest from the chord between its ends, zeros dropped; of equally far ones the first.

    A spectrum without a bend (one or two values, a flat or an exactly geometric one) keeps all its nonzero values.
    """

    def rank(self, spectrum: Spectrum) -> int:
        logs = [math.log(value) for value in spectrum.relative() if value > 0]
        if not logs:
            return 1
        last = len(logs) - 1
        fall = logs[-1]  # the first is 0
        best, farthest = last, 1e-9 * -fall  # nearer than this is rounding
        for index in range(1, last):
            # vertical distances: perpendicular ones are these times one constant
            distance = abs(logs[index] - fall * index / last)
            if distance > farthest * (1 + 1e-9):
                best, farthest = index, distance
        return best + 1


@final
@dataclass(frozen=True)
class AdapterTuneElbow(LocalPolicy):
    """The largest rank r with sigma_r^2 > noise * d / samples: AdapterTune's elbow, reconstructed from its abstract.

    arXiv 2603.14706 weighs the energy left out against an estimation error c * r * d / n. Here `noise` is c, which has
    units, so the rule depends on the scale; d is (rows + cols) / 2, the feature dimension when the map is square.
    """

    noise: float
    samples: int

    def __post_init__(self) -> None:
        if not 0 <= self.noise < math.inf or self.samples < 1:
            raise UsageError(f"noise {self.noise} must be finite and not negative, samples {self.samples} at least 1")

    def rank(self, spectrum: Spectrum) -> int:
        floor = self.noise * (spectrum.rows + spectrum.cols) / 2 / self.samples
        return max(1, sum(value * value > floor for value in spectrum.values))


@final
@dataclass(frozen=True)
class Budget:
    """The ranks of least total squared error among all that fit `bytes_`, which counts every spectrum's `bytes_at`.

    `relative_to` divides each target's squared error by the squared norm of its base weight or of its own delta. No
    bytes are spent on zeros. A minimum that was not proven shows in `Allocation.optimality_gap`; the argument stands in
    loratools.budget.
    """

    bytes_: int
    relative_to: Literal["base", "self"] | None = None

    def __post_init__(self) -> None:
        if self.bytes_ < 1:
            raise UsageError(f"a budget of {self.bytes_} bytes holds nothing")


Policy: TypeAlias = LocalPolicy | Budget


@final
@dataclass(frozen=True)
class PerTarget:
    """`rule` for every target but the `exceptions`, which have rules of their own."""

    rule: LocalPolicy
    exceptions: Mapping[str, LocalPolicy]

    def of(self, target: str) -> LocalPolicy:
        """The rule for one target."""
        return self.exceptions.get(target, self.rule)


@dataclass(frozen=True)
class Allocation:
    """One rank for each target, with the squared error (as the policy weighs it) and the bytes that follow from them.

    `optimality_gap` is the most by which the squared error can exceed the least possible under the budget.
    """

    ranks: dict[str, int]
    squared_error: float
    bytes: int
    optimality_gap: float = 0.0


def allocate(spectra: Mapping[str, Spectrum], policy: Policy | PerTarget, limits: Limits = Limits()) -> Allocation:
    """The ranks that `policy` chooses for `spectra` within `limits`."""
    if isinstance(policy, Budget):
        return _spend(spectra, policy, limits)
    rules = policy if isinstance(policy, PerTarget) else PerTarget(policy, {})
    ranks = {name: rules.of(name).rank(spectrum) for name, spectrum in spectra.items()}
    if limits.uniform and ranks:
        common = limits.fit(max(ranks.values()), _most_values(spectra))
        ranks = _common_ranks(spectra, common)
    else:
        ranks = {name: limits.fit(rank, len(spectra[name].values)) for name, rank in ranks.items()}
    return _allocation(spectra, ranks, dict.fromkeys(spectra, 1.0))


def _spend(spectra: Mapping[str, Spectrum], budget: Budget, limits: Limits) -> Allocation:
    weights = {name: _weight(name, spectrum, budget.relative_to) for name, spectrum in spectra.items()}
    if limits.uniform and spectra:
        return _spend_uniformly(spectra, budget, limits, weights)
    rungs = {name: limits.rungs(len(spectrum.values)) for name, spectrum in spectra.items()}
    left = budget.bytes_ - sum(spectra[name].bytes_at(ladder[0]) for name, ladder in rungs.items())
    _check_fits(budget, left)
    levels, gap = buy([_steps(spectra[name], ladder, weights[name]) for name, ladder in rungs.items()], left)
    ranks = {name: ladder[level] for (name, ladder), level in zip(rungs.items(), levels, strict=True)}
    return _allocation(spectra, ranks, weights, gap)


def _steps(spectrum: Spectrum, rungs: list[int], weight: float) -> list[Step]:
    """What each climb to the next rung gains and costs, up to the last that reduces the error."""
    squares = [value * value for value in spectrum.values]
    steps = []
    for low, high in pairwise(rungs):
        gain = weight * math.fsum(squares[low:high])
        if gain == 0:
            break
        steps.append((gain, (high - low) * int(spectrum.cost_per_rank)))
    return steps


def _spend_uniformly(
    spectra: Mapping[str, Spectrum], budget: Budget, limits: Limits, weights: Mapping[str, float]
) -> Allocation:
    """The largest common rank that fits and still reduces the error, which a common rank can only do by growing."""
    useful = max(spectrum.n_nonzero() for spectrum in spectra.values())
    rungs = limits.rungs(_most_values(spectra))
    top = limits.fit(useful, _most_values(spectra))
    best = rungs[0]
    for rung in rungs:
        left = budget.bytes_ - sum(s.bytes_at(min(rung, len(s.values))) for s in spectra.values())
        if rung == best:
            _check_fits(budget, left)
        if left < 0 or rung > top:
            break
        best = rung
    return _allocation(spectra, _common_ranks(spectra, best), weights)


def _weight(name: str, spectrum: Spectrum, relative_to: Literal["base", "self"] | None) -> float:
    if relative_to is None:
        return 1.0
    if relative_to == "self":
        norm = spectrum.error_at(0)
        return 1 / norm if norm else 0.0  # an all-zero delta loses nothing at any rank
    if spectrum.base_norm is None:
        raise NeedsBaseError(f"{name}: an error relative to the base needs the base weight; give it or weigh by self")
    if not 0 < spectrum.base_norm < math.inf:
        raise AdapterError(f"{name}: the base weight has norm {spectrum.base_norm}; no error is relative to that")
    return spectrum.base_norm**-2


def _allocation(
    spectra: Mapping[str, Spectrum], ranks: dict[str, int], weights: Mapping[str, float], gap: float = 0.0
) -> Allocation:
    error = math.fsum(weights[name] * spectra[name].error_at(rank) for name, rank in ranks.items())
    return Allocation(ranks, error, sum(spectra[name].bytes_at(rank) for name, rank in ranks.items()), gap)


def _most_values(spectra: Mapping[str, Spectrum]) -> int:
    return max(len(spectrum.values) for spectrum in spectra.values())


def _common_ranks(spectra: Mapping[str, Spectrum], rank: int) -> dict[str, int]:
    return {name: min(rank, len(spectrum.values)) for name, spectrum in spectra.items()}


def _check_fits(budget: Budget, left: int) -> None:
    if left < 0:
        least = budget.bytes_ - left
        raise UsageError(
            f"a budget of {budget.bytes_} bytes is too small: the lowest allowed ranks need {least} bytes "
            f"({format_size(least)})"
        )


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise UsageError(f"share {share} is not in (0, 1]: write 95 % as 0.95")


def _least_rank(spectrum: Spectrum, share: float, measure: Callable[[float], float]) -> int:
    if share == 1:  # only exact zeros may go, whatever rounding says
        return max(1, spectrum.n_nonzero())
    parts = [measure(value) for value in spectrum.relative()]
    goal = share * math.fsum(parts) * (1 - _ROUNDING)
    return next(rank for rank, kept in enumerate(accumulate(parts), 1) if kept >= goal or rank == len(parts))
