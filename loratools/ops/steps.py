"""The step of the grid that makes a file of a given size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

from loratools.errors import UsageError
from loratools.ops.gridding import DEADZONE
from loratools.sizes import format_size

_NEAR = 0.99  # of the budget: nearer is not worth another pass
_PASSES = 8
_PER_COMPONENT = 4.0  # bytes: its gain and its classes
_PER_TARGET = 40.0
_FINEST_BITS = 40  # octaves below the largest entry, and above it, between which steps are sought


@dataclass(frozen=True)
class Spread:
    """Some numbers of one distribution: how many they are, and their root mean square."""

    count: int
    rms: float


@dataclass
class StepSearch:
    """Finds the finest step whose file fits `goal` bytes, trying a few: sizes fall steadily as the step grows."""

    goal: int
    spreads: Sequence[Spread]
    fixed: float  # bytes of the file that no step changes, as far as is known
    tries: list[tuple[float, int]] = field(default_factory=list)

    @classmethod
    def begun(cls, goal: int, spreads: Iterable[Spread], n_targets: int) -> StepSearch:
        """For the numbers that go on the grid, which belong to `n_targets`."""
        return cls(goal, tuple(spreads), _PER_TARGET * n_targets)

    def next_step(self) -> float | None:
        """The step to try next; None where the best one is known. UsageError where no step fits."""
        fitting = [(step, size) for step, size in self.tries if size <= self.goal]
        if any(size >= _NEAR * self.goal for _, size in fitting):
            return None
        if len(self.tries) >= _PASSES or (self.tries and self._is_exhausted()):
            if not fitting:
                least = min(size for _, size in self.tries)
                raise UsageError(
                    f"a budget of {self.goal} bytes is too small: {least} bytes ({format_size(least)}) remain where "
                    "nothing is left of the deltas"
                )
            return None
        if not self.tries:
            return self._modelled(1.0)
        # the model is right but for a factor, which the nearest try tells
        step, size = min(self.tries, key=lambda pair: abs(math.log(pair[1] / self.goal)))
        guess = self._modelled(max(self._bytes(step), 1.0) / size)
        below = max((s for s, size in self.tries if size > self.goal), default=None)  # too fine
        above = min((s for s, _ in fitting), default=None)
        if below is not None and guess <= below:
            guess = math.sqrt(below * above) if above is not None else below * 1.3
        elif above is not None and guess >= above:
            guess = math.sqrt(below * above) if below is not None else above / 1.3
        return guess

    def tried(self, step: float, size: int) -> None:
        """What the file takes with a step."""
        self.tries.append((step, size))

    @property
    def best(self) -> float:
        """The finest step that fits."""
        return min(step for step, size in self.tries if size <= self.goal)

    def _is_exhausted(self) -> bool:
        """Whether no other step would come nearer: all is kept already, or nothing is."""
        steps = [step for step, _ in self.tries]
        sizes = [size for _, size in self.tries]
        top = max((s.rms * math.sqrt(s.count) for s in self.spreads), default=0.0)
        all_kept = min(steps) <= top * 2.0**-_FINEST_BITS or (max(sizes) <= self.goal and len(set(sizes)) < len(sizes))
        return not self.spreads or all_kept or (max(steps) >= 4 * top and min(sizes) > self.goal)

    def _modelled(self, bias: float) -> float:
        """The step at which the model, divided by `bias`, meets a little less than the goal."""
        top = max((s.rms * math.sqrt(s.count) for s in self.spreads), default=1.0)
        low, high = math.log(top) - _FINEST_BITS * math.log(2), math.log(top) + 2 * math.log(2)
        for _ in range(40):
            middle = (low + high) / 2
            if self._bytes(math.exp(middle)) / bias > 0.996 * self.goal:
                low = middle
            else:
                high = middle
        return math.exp(high)

    def _bytes(self, step: float) -> float:
        """What the file takes, by the entropy of Gaussian numbers on the grid."""
        total = self.fixed
        for spread in self.spreads:
            if (bits := gaussian_bits(spread.rms / step)) > 1e-3:
                total += bits * spread.count / 8 + _PER_COMPONENT / 2
        return total


def gaussian_bits(deviation: float) -> float:
    """Entropy in bits of a Gaussian number of `deviation` steps, rounded as `gridding.rounded` does."""
    if deviation <= 0.05:
        return 0.0
    at = _STEPS_OF_TABLE * math.log2(deviation / 0.05)
    if at >= _TABLE_ENTRIES - 1:
        return math.log2(deviation) + math.log2(math.sqrt(2 * math.pi * math.e))
    low = int(at)
    return _bits_at(low) * (1 - at + low) + _bits_at(low + 1) * (at - low)


_STEPS_OF_TABLE, _TABLE_ENTRIES = 8, 90  # to an octave of deviations, from 0.05 to about 100


@cache
def _bits_at(index: int) -> float:
    deviation = 0.05 * 2 ** (index / _STEPS_OF_TABLE)

    def above(x: float) -> float:
        return 0.5 * math.erfc(x / deviation / math.sqrt(2))

    bits, edge = 0.0, 0.5 + DEADZONE
    shares = [1 - 2 * above(edge)]
    while (mass := above(edge) - above(edge + 1)) > 1e-12:
        shares += [mass, mass]
        edge += 1
    for share in shares:
        bits -= share * math.log2(share) if share > 0 else 0.0
    return bits
