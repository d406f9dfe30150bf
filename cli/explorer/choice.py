"""The ranks that the explorer previews: one rule for all targets, and ranks of their own for some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from loratools.rank_choice import RankChoice
from loratools.ranks import Energy, Fixed, LocalPolicy, PerTarget

# Shares of energy that the keys step through: finer where the ranks change most.
SHARES: Final = (
    *(percent / 100 for percent in range(5, 50, 5)),
    *(percent / 100 for percent in range(50, 100)),
    *(0.995, 0.999, 0.9999, 1.0),
)
_LEAP: Final = 5  # shares at once


class Mode(Enum):
    """The rule for all targets."""

    RANK = "rank"
    ENERGY = "energy"


@dataclass(frozen=True)
class Choice:
    """What the user set. `most` is the largest rank of any target, beyond which nothing changes."""

    most: int
    rank: int
    share: float = 0.95
    mode: Mode = Mode.RANK
    own: Mapping[str, int] = field(default_factory=dict)  # target -> its rank

    @property
    def rule(self) -> LocalPolicy:
        """What holds for targets without a rank of their own."""
        return Fixed(self.rank) if self.mode is Mode.RANK else Energy(self.share)

    @property
    def policy(self) -> LocalPolicy | PerTarget:
        """All of it, as `squeeze` takes it."""
        return PerTarget(self.rule, {t: Fixed(rank) for t, rank in self.own.items()}) if self.own else self.rule

    @property
    def tag(self) -> str:
        """What the default output's name says: as for `loratools squeeze`, with a word for ranks of their own."""
        chosen = RankChoice(rank=self.rank) if self.mode is Mode.RANK else RankChoice(energy=self.share)
        return chosen.tag + "-own" * bool(self.own)

    @property
    def position(self) -> float:
        """Where the slider stands, from 0 to 1."""
        if self.mode is Mode.ENERGY:
            return SHARES.index(self.share) / (len(SHARES) - 1)
        return (self.rank - 1) / (self.most - 1) if self.most > 1 else 1.0

    def stepped(self, by: int) -> Choice:
        """One rank, or one share, up or down."""
        if self.mode is Mode.ENERGY:
            return self._at_share(SHARES.index(self.share) + by)
        return replace(self, rank=within(self.rank + by, self.most))

    def leapt(self, up: bool) -> Choice:
        """Twice the rank or half of it, or several shares at once."""
        if self.mode is Mode.ENERGY:
            return self._at_share(SHARES.index(self.share) + (_LEAP if up else -_LEAP))
        return replace(self, rank=leap(self.rank, up, self.most))

    def moved_to(self, position: float) -> Choice:
        """The slider at a place between 0 and 1."""
        if self.mode is Mode.ENERGY:
            return self._at_share(round(position * (len(SHARES) - 1)))
        return replace(self, rank=within(1 + round(position * (self.most - 1)), self.most))

    def in_mode(self, mode: Mode) -> Choice:
        """The other rule, where it was left."""
        return replace(self, mode=mode)

    def with_own(self, ranks: Mapping[str, int]) -> Choice:
        """These targets at ranks of their own."""
        return replace(self, own={**self.own, **ranks})

    def without_own(self, targets: Iterable[str]) -> Choice:
        """These targets under the common rule again."""
        dropped = set(targets)
        return replace(self, own={t: rank for t, rank in self.own.items() if t not in dropped})

    def _at_share(self, index: int) -> Choice:
        return replace(self, share=SHARES[max(0, min(len(SHARES) - 1, index))])


def within(rank: int, most: int) -> int:
    """`rank`, or the nearest that there is."""
    return max(1, min(rank, most))


def leap(rank: int, up: bool, most: int) -> int:
    """Twice or half of `rank`, within what there is."""
    return within(2 * rank if up else -(-rank // 2), most)
