"""Spectra and comparisons, made batch by batch in the background: what the user looks at comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Final, TypeVar

from loratools.errors import LoratoolsError
from loratools.ops.diff import diff_target
from loratools.ops.inspect import blind, places, target_numbers
from loratools.ops.preview import Curve, curve_of
from loratools.ops.spectra import group_targets, measure
from loratools.pipeline import ordered_map, worker_count
from loratools_cli.failures import explain

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.ops.spectra import Measured
    from loratools.reports.diff import TargetDiff
    from loratools.reports.inspect import TargetNumbers

NONFINITE: Final = "holds NaN or infinity"
_PAIRS: Final = 8  # compared before the next look at what is wanted
T = TypeVar("T")
R = TypeVar("R")
# What reading and linear algebra raise; torch's own failures are RuntimeErrors.
_FAILURES: Final = (LoratoolsError, OSError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class Found:
    """One target measured, or `problem`: why it could not be, or, with numbers, what they lack."""

    target: str
    numbers: TargetNumbers | None
    curve: Curve | None
    problem: str | None = None


@dataclass(frozen=True)
class Compared:
    """One target beside the same in the other adapter, as far as that could be said."""

    target: str
    numbers: TargetNumbers | None  # of the other's
    curve: Curve | None
    row: TargetDiff | None
    problem: str | None = None


@dataclass
class Measuring:
    """The work to do. `wanted` names the target that the user looks at, `stopped` whether nobody waits any more."""

    adapter: Adapter
    base: BaseWeights | None
    other: Adapter | None
    pairs: Mapping[str, str]  # target -> that of the other adapter
    wanted: Callable[[], str | None]
    stopped: Callable[[], bool]
    _places: Mapping[str, tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self._places = places(list(self.adapter.entries))

    def run(self) -> Iterator[list[Found] | list[Compared]]:
        """Everything once, some results at a time; a few targets more than asked for when stopped."""
        batches, hopeless = self._batches()
        if hopeless:
            yield hopeless
        where = {target: i for i, batch in batches.items() for target in batch}
        to_compare = dict(self.pairs)
        while (batches or to_compare) and not self.stopped():
            target = self.wanted()
            if target in where and where[target] in batches:
                yield self._measured(batches.pop(where[target]))
            elif target in to_compare:
                yield self._compared({target: to_compare.pop(target)})
            elif batches:
                chosen = [batches.pop(i) for i in list(batches)[: worker_count("cpu")]]
                yield self._measured([target for batch in chosen for target in batch])
            else:
                yield self._compared({t: to_compare.pop(t) for t in list(to_compare)[:_PAIRS]})

    def _batches(self) -> tuple[dict[int, list[str]], list[Found]]:
        """What can be measured, factored families first: a dense one may take long, so it comes alone."""
        entries = self.adapter.entries
        reasons = dict(self.adapter.unsupported)
        if self.base is None:
            blinds = {t: reason for t, e in entries.items() if (reason := blind(e)) is not None}
            reasons |= {t: reason.replace("pass --base", "open it with a BASE") for t, reason in blinds.items()}
        able = [t for t in entries if t not in reasons]
        batches = group_targets(self.adapter, [t for t in able if entries[t].is_factored], "cpu")
        batches += [[t] for t in able if not entries[t].is_factored]
        return dict(enumerate(batches)), [Found(t, None, None, r) for t, r in reasons.items() if t in entries]

    def _measured(self, targets: Sequence[str]) -> list[Found]:
        return self._each(self._found, _spectra(self.adapter, targets, self.base).items())

    def _compared(self, pairs: Mapping[str, str]) -> list[Compared]:
        assert self.other is not None
        spectra = _spectra(self.other, list(pairs.values()), self.base)
        return self._each(self._beside, [(target, partner, spectra[partner]) for target, partner in pairs.items()])

    def _each(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """The work on each of some items, side by side, as far as one comes before it is stopped."""
        results = ordered_map(work, items, workers=worker_count("cpu"))
        with closing(results):
            return list(takewhile(lambda _: not self.stopped(), results))

    def _found(self, item: tuple[str, Measured | str]) -> Found:
        target, measured = item
        if isinstance(measured, str):
            return Found(target, None, None, measured)
        try:
            curve = curve_of(self.adapter.entries[target], measured)
            place, problem = self._places[target], None
            try:
                numbers = target_numbers(self.adapter, measured, place, base=self.base)
            except LoratoolsError as error:  # a base that lacks this parameter: all but the relative norm is known
                numbers, problem = target_numbers(self.adapter, measured, place), str(error)
        except _FAILURES as error:
            return Found(target, None, None, explain(error)[1])
        return Found(target, numbers, curve, problem)

    def _beside(self, item: tuple[str, str, Measured | str]) -> Compared:
        assert self.other is not None
        target, partner, measured = item
        if isinstance(measured, str):
            return Compared(target, None, None, None, f"the other {measured}")
        try:
            curve = curve_of(self.other.entries[partner], measured)
            numbers = target_numbers(self.other, measured, self._places[target])
            try:
                row = diff_target(self.adapter, self.other, (target, partner), base=self.base)
            except LoratoolsError as error:
                return Compared(target, numbers, curve, None, str(error))
        except _FAILURES as error:
            return Compared(target, None, None, None, explain(error)[1])
        return Compared(target, numbers, curve, row)


def _spectra(adapter: Adapter, targets: Sequence[str], base: BaseWeights | None) -> dict[str, Measured | str]:
    """Spectra, or why there is none; where a batch fails, its targets are measured one by one."""
    found: dict[str, Measured | str] = {}
    try:
        for measured in measure(adapter, targets, base=base, allow_nonfinite=True, directions=True):
            found[measured.target] = measured if measured.blocks else NONFINITE
    except _FAILURES as error:
        if len(targets) == 1:
            return {targets[0]: explain(error)[1]}
        for target in targets:
            found |= _spectra(adapter, [target], base)
    return found
