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
_FAR = 0.9  # of the budget: what leaves more unused is worth as many passes again
_PASSES = 8
_PER_COMPONENT = 4.0  # bytes: its gain and its classes
_PER_TARGET = 40.0


@dataclass(frozen=True)
class Spread:
    """Some numbers of one distribution: how many they are, their root mean square, and the finest step they take."""

    count: int
    rms: float
    finest: float  # a step below it makes the same codes


@dataclass
class StepSearch:
    """Finds the finest step whose file fits `goal` bytes, trying a few: sizes fall steadily as the step grows."""

    goal: int
    spreads: Sequence[Spread]
    overhead: float  # bytes of the file that no step changes: a guess, until one was tried
    asked: str  # what the goal follows from
    tries: list[tuple[float, int]] = field(default_factory=list)

    @classmethod
    def begun(cls, goal: int, spreads: Iterable[Spread], n_targets: int, asked: str) -> StepSearch:
        """For the numbers that go on the grid, which belong to `n_targets`."""
        return cls(goal, tuple(s for s in spreads if s.rms > 0), _PER_TARGET * n_targets, asked)

    def next_step(self) -> float | None:
        """The step to try next; None where the best one is known. UsageError where no step fits."""
        if not self.tries:
            return self._modelled(1.0)
        fitting = [(step, size) for step, size in self.tries if size <= self.goal]
        used = max((size / self.goal for _, size in fitting), default=0.0)
        if used >= _NEAR or len(self.tries) >= (_PASSES if used >= _FAR else 2 * _PASSES) or self._is_exhausted():
            if not fitting:
                least = min(size for _, size in self.tries)
                raise UsageError(
                    f"{self.asked} is too small: {least} bytes ({format_size(least)}) remain where nothing is left of "
                    "the deltas"
                )
            return None
        if not fitting and len(self.tries) == 2 * _PASSES - 1:
            return self._coarsest
        # the model is right but for a factor, which the nearest try tells
        step, size = min(self.tries, key=lambda pair: abs(math.log(pair[1] / self.goal)))
        guess = self._modelled(max(size - self.overhead, 1.0) / max(self._codes(step), 1.0))
        too_fine = max((s for s, size in self.tries if size > self.goal), default=self._finest)
        fits = min((s for s, _ in fitting), default=self._coarsest)
        if too_fine < guess < fits or (guess == fits and not fitting):
            return guess
        # where nothing fits yet, by strides that grow: the model may be far off where names take the most
        return math.sqrt(too_fine * fits) if fitting else min(fits, too_fine * 1.3**2.0 ** (len(self.tries) - 1))

    def tried(self, step: float, size: int, overhead: int) -> None:
        """What the file takes with a step, `overhead` bytes of it for other things than codes and scales."""
        self.tries.append((step, size))
        self.overhead = overhead

    @property
    def best(self) -> float:
        """The finest step that fits."""
        return min(step for step, size in self.tries if size <= self.goal)

    @property
    def _finest(self) -> float:
        """The step at which all is kept that can be."""
        return min((s.finest for s in self.spreads), default=1.0)

    @property
    def _coarsest(self) -> float:
        """A step at which nothing is kept."""
        return 4 * max((s.rms * math.sqrt(s.count) for s in self.spreads), default=1.0)

    def _is_exhausted(self) -> bool:
        """Whether no other step would come nearer: all is kept already, or nothing is."""
        if not self.spreads:
            return True
        return any(step <= self._finest if size <= self.goal else step >= self._coarsest for step, size in self.tries)

    def _modelled(self, bias: float) -> float:
        """The step at which the model, its codes times `bias`, meets a little less than the goal."""
        room = 0.996 * self.goal - self.overhead
        if not self.spreads or bias * self._codes(self._finest) <= room:
            return self._finest
        if bias * self._codes(self._coarsest) > room:
            return self._coarsest
        low, high = math.log(self._finest), math.log(self._coarsest)
        for _ in range(40):
            middle = (low + high) / 2
            if bias * self._codes(math.exp(middle)) > room:
                low = middle
            else:
                high = middle
        return math.exp(high)

    def _codes(self, step: float) -> float:
        """What codes and scales take, by the entropy of Gaussian numbers on the grid."""
        total = 0.0
        for spread in self.spreads:
            if (bits := gaussian_bits(spread.rms / max(step, spread.finest))) > 1e-3:
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
