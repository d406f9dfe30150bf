"""Ways to write one adapter, side by side: each is a recipe, and all are measured by the same few lines."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

from loratools._lazy import torch
from loratools.errors import AdapterError, LoratoolsError, UnchangedError
from loratools.families.base import LowRankUpdate
from loratools.files import header_room
from loratools.linalg.factored import factored, squared_distance
from loratools.linalg.inner import frobenius
from loratools.operators import LowRank, sum_of
from loratools.ops.spectra import base_tensor, known_delta
from loratools.ops.squeeze import Squeeze, squeeze
from loratools.ops.weighing import input_norm
from loratools.pipeline import ordered_map, worker_count
from loratools.reports.pareto import Point

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update
    from loratools.linalg.factored import Factored
    from loratools.linalg.input_norm import InputNorm
    from loratools.operators import Operator
    from loratools.ops.extract import Differences
    from loratools.ops.statistics import Statistics

HELD_BYTES = 1 << 30  # of what is read once and kept; beyond, targets are read again for every point
_Squares = tuple[float, float, float, float]  # distance and norm, plain and as inputs see them


@dataclass(frozen=True, eq=False)
class Made:
    """An adapter as it is read again from the file that a recipe would write, and the size of that file."""

    adapter: Adapter
    bytes: int

    @classmethod
    def ordinary(cls, adapter: Adapter) -> Made:
        """An adapter that is written in its own dialect."""
        return cls(adapter, size_of(adapter))


class Recipe(ABC):
    """How one file is made of an adapter: plain data."""

    @abstractmethod
    def make(self, source: Source) -> Made:
        """LoratoolsError where it cannot be made, UnchangedError where nothing would change."""


@dataclass(frozen=True)
class Setting:
    """One point to be measured; `command` is what a user would type."""

    method: str
    label: str
    command: str
    recipe: Recipe


@final
@dataclass(frozen=True, eq=False)
class Source:
    """What recipes start from, and what points are measured against, with all that need be made only once.

    `weights`: statistics of what enters it; `differences`: of a model that was tuned whole, what it was made of;
    `base`: the model, for deltas that depend on it. Updates and decompositions are kept while each take less than
    `HELD_BYTES`.
    """

    adapter: Adapter
    weights: Statistics | None = None
    differences: Differences | None = None
    base: BaseWeights | None = None
    _lower: dict[int, Adapter] = field(default_factory=dict, repr=False)
    _factored: dict[str, Factored] = field(default_factory=dict, repr=False)
    _norms: dict[str, InputNorm] = field(default_factory=dict, repr=False)

    @classmethod
    def held(
        cls,
        adapter: Adapter,
        weights: Statistics | None = None,
        differences: Differences | None = None,
        base: BaseWeights | None = None,
    ) -> Source:
        """The source with the adapter's updates in memory, as many as fit."""
        return cls(in_memory(adapter), weights, differences, base)

    @property
    def bytes(self) -> int:
        """Of the adapter's own file."""
        return size_of(self.adapter)

    @property
    def top(self) -> int:
        """The highest rank of a target; 0 where none has ranks."""
        return max((e.rank for e in self.adapter.entries.values() if e.is_factored), default=0)

    def at_rank(self, rank: int | None) -> Adapter:
        """The adapter squeezed to a rank, once for all recipes that start there; as it is at None."""
        if rank is None:
            return self.adapter
        if rank not in self._lower:
            self._lower[rank] = squeeze(self.adapter, rank, options=Squeeze(allow_unchanged=True))[0]
        return self._lower[rank]

    def delta(self, adapter: Adapter, target: str) -> Operator:
        """Of this adapter or of one that was made of it, float64; a direction where the base it needs is not here.

        AdapterError where it is more than a magnitude that needs it.
        """
        entry, update = adapter.entries[target], adapter[target]
        if self.base is None or not entry.needs_base:
            return known_delta(update)
        return update.operator(base_tensor(adapter, target, entry, self.base)).to(torch.float64)

    def squares(self, target: str, made: Adapter, name: str) -> _Squares:
        """||delta - delta'||^2 and ||delta||^2, and both in the norm of the inputs, 0 where these are not known.

        `name` is what `made` calls the target.
        """
        update = self.adapter[target]
        one, two = self.delta(self.adapter, target), self.delta(made, name)
        if one.shape != two.shape:
            raise AdapterError(f"{target}: its delta has the shape {two.shape} instead of {one.shape}")
        if isinstance(one, LowRank) and isinstance(two, LowRank):
            f = self._decomposed(target, one)
            squares = squared_distance(f, (two.left * two.scale)[None], two.right[None])
            distance, norm = (max(0.0, float(s)) for s in squares)
        else:
            distance, norm = frobenius(sum_of([one, -two])) ** 2, frobenius(one) ** 2
        if self.weights is None or target not in self.weights.moments or not isinstance(update, LowRankUpdate):
            return distance, norm, 0.0, 0.0
        if target not in self._norms:
            self._norms[target] = input_norm(target, update, self.weights)
        inputs = self._norms[target]
        return distance, norm, inputs.squared(sum_of([one, -two])), inputs.squared(one)

    def _decomposed(self, target: str, delta: LowRank) -> Factored:
        if target in self._factored:
            return self._factored[target]
        f = factored((delta.left.double() * delta.scale)[None], delta.right.double()[None])
        if sum(e.left.nbytes + e.right.nbytes for e in list(self._factored.values())) < HELD_BYTES:
            self._factored[target] = f
        return f


def in_memory(adapter: Adapter) -> Adapter:
    """The same adapter, whose updates stay in memory once they are read, while they take less than `HELD_BYTES`."""
    left = [HELD_BYTES]

    def kept(read: Callable[[], Update]) -> Callable[[], Update]:
        found: list[Update] = []

        def once() -> Update:
            if found:
                return found[0]
            update = read()
            size = sum(tensor.nbytes for tensor in update.parameters().values())
            if size <= left[0]:
                left[0] -= size
                found.append(update)
            return update

        return once

    return replace(adapter, entries={t: replace(e, read=kept(e.read)) for t, e in adapter.entries.items()})


def size_of(adapter: Adapter) -> int:
    """Bytes of the file that an adapter is in, or that it would be written to."""
    return adapter.origin.nbytes if adapter.origin and adapter.record is None else adapter.nbytes + header_room(adapter)


def errors(source: Source, made: Adapter) -> tuple[float, float | None]:
    """||delta - delta'|| / ||delta|| of all targets together, plain and as inputs see it; of directions, for DoRA.

    The weighted one is of the targets that the statistics know, and None without them. AdapterError where the two do
    not have the same modules.
    """
    names = _names(source.adapter, made)

    def work(target: str) -> _Squares:
        return source.squares(target, made, names[target])

    rows = list(ordered_map(work, source.adapter.entries, workers=worker_count("cpu")))
    distance, norm, seen, of_inputs = (math.fsum(c) for c in zip((0.0,) * 4, *rows, strict=True))
    weighted = None if source.weights is None else math.sqrt(seen / of_inputs) if of_inputs else 0.0
    return math.sqrt(distance / norm) if norm else 0.0, weighted


def relative_error(before: Adapter, after: Adapter) -> float:
    """||delta - delta'|| / ||delta|| of all targets together; of directions, where a delta needs the base."""
    return errors(Source(before), after)[0]


def _names(source: Adapter, made: Adapter) -> dict[str, str]:
    """What the targets of the source are called in `made`, which another dialect may spell otherwise."""
    if set(made.entries) == set(source.entries):
        return {target: target for target in source.entries}
    others = {_module(made, target): target for target in made.entries}
    names = {target: others.get(_module(source, target), "") for target in source.entries}
    if missing := [target for target, other in names.items() if not other]:
        raise AdapterError(f"{missing[0]}: is not among the {len(made.entries)} targets that were made of it")
    return names


def _module(adapter: Adapter, target: str) -> str:
    placement = adapter.format.place(target)
    return placement.pieces[0].module.path if placement is not None and len(placement.pieces) == 1 else target


def measure(source: Source, setting: Setting) -> Point:
    """Make what a setting makes, and measure it; LoratoolsError where that cannot be done."""
    made = setting.recipe.make(source)
    error, weighted = errors(source, made.adapter)
    return Point(setting.method, setting.label, made.bytes, error, weighted, False, setting.command)


@dataclass(frozen=True)
class Measured:
    """The points in the order of their settings, with these, and what could not be made: method -> first reason."""

    found: tuple[tuple[Setting, Point], ...]
    failed: dict[str, str]


def measure_all(source: Source, settings: Sequence[Setting], *, step: Callable[[], None] = lambda: None) -> Measured:
    """Every setting that can be made, in turn; one that would change nothing is no point. `step` is called for each."""
    found: list[tuple[Setting, Point]] = []
    failed: dict[str, str] = {}
    for setting in settings:
        try:
            found.append((setting, measure(source, setting)))
        except UnchangedError:
            continue
        except LoratoolsError as problem:
            failed.setdefault(setting.method, str(problem))
        finally:
            step()
    return Measured(tuple(found), failed)


def marked(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points by size, largest first, with those that no other beats in both bytes and error marked as best.

    The error is the weighted one where all have it.
    """
    weighted = all(p.weighted_error is not None for p in points)

    def error(point: Point) -> float:
        return point.weighted_error if weighted and point.weighted_error is not None else point.relative_error

    ordered = sorted(points, key=lambda p: (p.bytes, error(p)))
    least = math.inf
    out = []
    for point in ordered:
        best = error(point) < least
        least = min(least, error(point))
        out.append(replace(point, best=best))
    return tuple(reversed(out))
