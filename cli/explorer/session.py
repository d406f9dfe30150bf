"""What an exploration knows: the adapter, what was measured so far, and the ranks that are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loratools.ops.inspect import places
from loratools.ops.matching import matched
from loratools.ops.preview import Curve, sized, unsized
from loratools.reports.inspect import Group, TargetNumbers, group
from loratools_cli.explorer.choice import Choice, leap, within
from loratools_cli.explorer.grouping import Branch, By, branches, matching
from loratools_cli.explorer.measuring import Compared, Found

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.reports.preview import Preview, TargetPreview

_FEW: Final = 256  # targets whose file's size is known within a frame


@dataclass
class Session:
    """Only the thread of the screen changes it; the measuring one reads `selected` and hands its results over."""

    adapter: Adapter
    base: BaseWeights | None = None
    other: Adapter | None = None
    numbers: dict[str, TargetNumbers] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    compared: dict[str, Compared] = field(default_factory=dict)
    by: By = "layer"
    pattern: str = ""
    selected: Branch = field(init=False)
    choice: Choice = field(init=False)

    def __post_init__(self) -> None:
        self.places = places(list(self.adapter.entries))
        rows = [] if self.other is None else matched([self.adapter, self.other])
        self.pairs = {a: b for a, b in rows if a is not None and b is not None}
        most = max((e.rank for e in self.adapter.entries.values() if e.is_factored), default=1)
        self.choice = Choice(most, max(1, most // 2))
        self.selected = self.root
        self._preview: tuple[Choice, int, Preview] | None = None
        self._group: tuple[tuple[tuple[str, ...], int], Group] | None = None  # several widgets ask for the same
        self.sizes_at_once = len(self.adapter.entries) <= _FEW

    @property
    def shown(self) -> list[str]:
        """The targets that the filter leaves."""
        return matching(self.adapter.entries, self.pattern)

    @property
    def root(self) -> Branch:
        """The tree's first line."""
        every = not self.pattern
        return Branch("all", "all targets" if every else "all that match", tuple(self.shown))

    def branches(self) -> list[tuple[Branch, list[Branch]]]:
        """The tree below its first line."""
        return branches(self.shown, self.places, self.by)

    def add(self, results: Sequence[Found] | Sequence[Compared]) -> None:
        """Take over what was measured."""
        for result in results:
            if isinstance(result, Compared):
                self.compared[result.target] = result
                continue
            if result.numbers is not None and result.curve is not None:
                self.numbers[result.target], self.curves[result.target] = result.numbers, result.curve
            if result.problem is not None:
                self.problems[result.target] = result.problem

    @property
    def work(self) -> int:
        """Results to wait for: one for each target, and one for each that both adapters have."""
        return len(self.adapter.entries) + len(self.pairs)

    @property
    def done(self) -> int:
        """Results that are there."""
        return self.settled + len(self.compared)

    @property
    def settled(self) -> int:
        """Targets that were measured or never will be."""
        return len(self.numbers.keys() | self.problems.keys())

    @property
    def preview(self) -> Preview:
        """What the chosen ranks do, as far as is known; of many targets the size is to come from `to_size`."""
        if self._preview is None or self._preview[:2] != (self.choice, self.settled):
            policy = self.choice.policy
            unmeasured = {t: reason for t, reason in self.problems.items() if t not in self.curves}
            has_base = self.base is not None
            found = unsized(self.adapter, self.curves, policy, unmeasured=unmeasured, has_base=has_base)
            found = sized(self.adapter, found, policy) if self.sizes_at_once else found
            self._preview = (self.choice, self.settled, found)
        return self._preview[2]

    def to_size(self) -> Callable[[], Callable[[], None]]:
        """Work for another thread: what it returns is for the screen's own, and puts the size into the preview."""
        choice, settled, found = self.choice, self.settled, self.preview

        def work() -> Callable[[], None]:
            done = sized(self.adapter, found, choice.policy)

            def take() -> None:
                if (self.choice, self.settled) == (choice, settled):
                    self._preview = (choice, settled, done)

            return take

        return work

    def previews(self, targets: Iterable[str]) -> list[TargetPreview]:
        """Those of some targets."""
        every = self.preview.targets
        return [every[target] for target in targets]

    def group(self, targets: tuple[str, ...]) -> Group | None:
        """Sums and means over the measured of some targets; None where none is."""
        known = [self.numbers[t] for t in targets if t in self.numbers]
        if not known:
            return None
        key = (targets, len(known))
        if self._group is None or self._group[0] != key:
            self._group = (key, group(known))
        return self._group[1]

    @property
    def own_targets(self) -> list[str]:
        """The selected targets that can have ranks of their own."""
        return [t for t in self.selected.targets if self.adapter.entries[t].is_factored]

    def own_rank(self) -> int | None:
        """The rank that the selected targets have now, the largest where they differ; None where none has any."""
        ranks = [one.rank_after or one.rank_before for one in self.previews(self.own_targets)]
        return max(ranks, default=None)

    def with_own(self, *, by: int = 0, up: bool | None = None) -> Choice:
        """The choice with the selection's own ranks moved: by steps, or to twice or half."""
        current = self.own_rank()
        if current is None:
            return self.choice
        return self.choice.with_own({
            t: within(current + by * e.rank_step, e.rank) if up is None else leap(within(current, e.rank), up, e.rank)
            for t in self.own_targets
            for e in (self.adapter.entries[t],)
        })  # fmt: skip

    def with_own_at(self, position: float) -> Choice:
        """The choice with the selection's own ranks at a place of the slider."""
        most = max((self.adapter.entries[t].rank for t in self.own_targets), default=1)
        wanted = 1 + round(position * (most - 1))
        return self.choice.with_own({t: within(wanted, self.adapter.entries[t].rank) for t in self.own_targets})
