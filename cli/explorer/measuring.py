"""Spectra and comparisons, made batch by batch in the background: what the user looks at comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loratools.errors import LoratoolsError
from loratools.ops.diff import diff_target
from loratools.ops.inspect import blind, places, target_numbers
from loratools.ops.preview import Curve, curve_of
from loratools.ops.spectra import group_targets, measure
from loratools.pipeline import worker_count
from loratools_cli.failures import explain

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.ops.spectra import Measured
    from loratools.reports.diff import TargetDiff
    from loratools.reports.inspect import TargetNumbers

NONFINITE: Final = "holds NaN or infinity"
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
                yield [self._compared(target, to_compare.pop(target))]
            elif batches:
                chosen = [batches.pop(i) for i in list(batches)[: worker_count("cpu")]]
                yield self._measured([target for batch in chosen for target in batch])
            else:
                target = next(iter(to_compare))
                yield [self._compared(target, to_compare.pop(target))]

    def _batches(self) -> tuple[dict[int, list[str]], list[Found]]:
        """What can be measured, factored families first: a dense one may take long, so it comes alone."""
        entries = self.adapter.entries
        reasons = dict(self.adapter.unsupported)
        if self.base is None:
            reasons |= {t: reason for t, e in entries.items() if (reason := blind(e)) is not None}
        able = [t for t in entries if t not in reasons]
        batches = group_targets(self.adapter, [t for t in able if entries[t].is_factored], "cpu")
        batches += [[t] for t in able if not entries[t].is_factored]
        return dict(enumerate(batches)), [Found(t, None, None, r) for t, r in reasons.items() if t in entries]

    def _measured(self, targets: Sequence[str]) -> list[Found]:
        found = []
        for target, measured in _spectra(self.adapter, targets, self.base).items():
            if self.stopped():
                break
            found.append(self._found(target, measured))
        return found

    def _found(self, target: str, measured: Measured | str) -> Found:
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

    def _compared(self, target: str, partner: str) -> Compared:
        assert self.other is not None
        measured = _spectra(self.other, [partner], self.base)[partner]
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
