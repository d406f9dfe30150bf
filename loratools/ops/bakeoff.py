"""One adapter's deltas through every family, at equal bytes on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import AdapterError, LoratoolsError, NeedsBaseError, UsageError
from loratools.families import FITTABLE, LoRA, fittable
from loratools.files import header_room
from loratools.linalg.svd import spectrum
from loratools.operators import LowRank
from loratools.ops.initial import refuse_mutated
from loratools.ops.measuring import Source as Measured
from loratools.ops.measuring import errors, size_of
from loratools.ops.reparameterize import (
    LOSSY,
    Reparameterize,
    arguments_of,
    composed,
    encoded,
    names_of,
    options_for,
    sources_of,
)
from loratools.pipeline import ordered_map, worker_count
from loratools.reports.bakeoff import BakeoffReport, Entrant
from loratools.sizes import format_size
from loratools.storage.base import DTYPES

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.families import Fittable
    from loratools.families.fitting import Source
    from loratools.operators import Operator

SHARES = (2, 4, 8, 16)  # by which the adapter's own bytes are divided where no budget is given
SAMPLE = 8  # targets
_TRIES = 3
_LONGER = 4  # bytes by which the header tells of a tensor in a larger file
_RANKED = 1024  # smaller side up to which a dense delta is asked for its rank
_CURVE = 64  # points of the reference, all of which are told
_STEP = 1.03  # ratio of the sizes of two points, where there are more
_SEEN = 1e-6  # of the largest singular value


@dataclass(frozen=True)
class Bakeoff:
    """What takes part.

    `families`: their names, all by default; `budgets`: bytes of a file of the chosen targets, by default parts of what
    they take now; `targets`: a shell pattern, or None for `sample` of them, evenly spread (0: all).
    """

    families: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    targets: str | None = None
    sample: int = SAMPLE
    base: BaseWeights | None = None
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if any(budget < 1 for budget in self.budgets) or self.sample < 0:
            raise UsageError("budgets are bytes, and a sample is a number of targets; both above 0")


def bakeoff(
    adapter: Adapter,
    how: Bakeoff = Bakeoff(),
    *,
    steps: Callable[[int, str], Callable[[], None]] | None = None,
) -> BakeoffReport:
    """Every family in every budget: the error, the energy kept and the rank of what a file of that size holds.

    Bytes are those of the whole file. A family that needs the base takes part where `how.base` is given; one that
    cannot be fitted to the targets is left out, with the reason. `steps(total, what)` may count the fits. Raises
    UsageError for an unknown family, AdapterError where none can be fitted.

    Deltas and base weights are read once and held. Options follow from shapes, so that budgets which a family cannot
    meet cost nothing, and those in which they are the same cost one fit; each other budget costs one, but two where the
    size of the header was not known, and an eigenvalue decomposition for each rank of a delta that is no product.
    """
    families = [fittable(name) for name in how.families] if how.families else list(FITTABLE.values())
    bench = _Bench.of(adapter, how)
    part = bench.measured.adapter
    budgets = sorted(how.budgets or {part.nbytes // share for share in SHARES})
    step = steps(len(families) * len(budgets), "fits") if steps else lambda: None

    def work(family: type[Fittable]) -> tuple[list[Entrant], str]:
        return _entered(bench, family, budgets, step)

    found = list(ordered_map(work, families, workers=worker_count("cpu")))
    entrants = [entrant for entered, _ in found for entrant in entered]
    left_out = {family.family: reason for family, (_, reason) in zip(families, found, strict=True) if reason}
    if not entrants:
        raise AdapterError(f"no family could be fitted: {next(iter(left_out.values()))}")
    reference = _reference(bench)
    return BakeoffReport(
        tuple(part.entries), _ranked(entrants), reference, left_out, adapter.warnings, len(adapter.entries)
    )


@dataclass(frozen=True, eq=False)
class _Bench:
    """What all families are fitted to and measured against; `based` are the sources with their base weights, where a
    base was given.
    """

    how: Bakeoff
    measured: Measured
    sources: Mapping[str, Source]
    based: Mapping[str, Source] | None

    @classmethod
    def of(cls, adapter: Adapter, how: Bakeoff) -> _Bench:
        """AdapterError where none of the chosen targets is a matrix."""
        adapter.require_weights()
        refuse_mutated(adapter, "another family cannot say which base weight that leaves")
        chosen = _chosen(adapter, how)
        part = replace(adapter, entries={target: adapter.entries[target] for target in chosen}, extras={})
        measured = Measured.held(part, base=how.base)
        sources, *_ = sources_of(measured.adapter, LoRA, _asked(how, None))
        if not sources:
            raise AdapterError("no target of the adapter is a matrix that a family could hold")
        entries = {target: measured.adapter.entries[target] for target in sources}
        measured = replace(measured, adapter=replace(part, entries=entries))
        return cls(how, measured, sources, None if how.base is None else _based(part, sources, how.base))

    def for_family(self, family: type[Fittable]) -> Mapping[str, Source]:
        """NeedsBaseError for one that is fitted to base weights, where there are none."""
        if not family.fits_with_base:
            return self.sources
        if self.based is None:
            raise NeedsBaseError("fitted to the base weights; name the base model")
        return self.based


def _based(part: Adapter, sources: Mapping[str, Source], base: BaseWeights) -> dict[str, Source]:
    return {
        target: source
        if source.base is not None
        else replace(source, base=base.find(part.format.parameter(target), source.layout.shape))
        for target, source in sources.items()
    }


def _chosen(adapter: Adapter, how: Bakeoff) -> tuple[str, ...]:
    targets = list(adapter.entries) if how.targets is None else list(adapter.select(how.targets))
    if how.targets is not None or not how.sample or len(targets) <= how.sample:
        return tuple(targets)
    spread = [round(i * (len(targets) - 1) / (how.sample - 1)) for i in range(how.sample)] if how.sample > 1 else [0]
    return tuple(targets[i] for i in spread)


def _asked(how: Bakeoff, budget: int | None) -> Reparameterize:
    return Reparameterize(budget=budget, base=how.base, dtype=how.dtype, seed=how.seed, accept_loss=True)


def _entered(
    bench: _Bench, family: type[Fittable], budgets: Sequence[int], step: Callable[[], None]
) -> tuple[list[Entrant], str]:
    """The family in those of the ascending budgets that it can meet, and why not in the largest of the others."""
    found: list[Entrant] = []
    reason = ""
    fits = _Fits(bench, family, _least_header(bench))
    for budget in budgets:
        try:
            found.append(fits.within(budget))
        except LoratoolsError as problem:
            reason = str(problem)
        finally:
            step()
    return found, reason


def _least_header(bench: _Bench) -> int:
    """Bytes that any file of these targets has beside their numbers: a few for each name."""
    return sum(len(name) for name in names_of(bench.measured.adapter).values())


@dataclass(eq=False)
class _Fits:
    """One family's fits, from small budgets to large ones: each tells the next how large a header is."""

    bench: _Bench
    family: type[Fittable]
    header: int
    last: tuple[Mapping[str, Any], Entrant] | None = None

    def within(self, budget: int) -> Entrant:
        """LoratoolsError where no file of `budget` bytes holds the targets."""
        adapter, sources = self.bench.measured.adapter, self.bench.for_family(self.family)
        for _ in range(_TRIES):
            asked = _asked(self.bench.how, max(0, budget - self.header))
            try:
                options = options_for(self.family, sources, asked)
            except UsageError:
                break
            if self.last is not None and options == self.last[0]:
                return replace(self.last[1], budget=budget)
            made = composed(adapter, encoded(self.family, sources, options), names_of(adapter))
            made = made.recorded("reparameterize", arguments_of(self.family, asked))
            size = size_of(made)
            self.header = size - made.nbytes + _LONGER * sum(len(entry.specs) for entry in made.entries.values())
            if size <= budget:
                self.last = options, self._measured(made, budget, asked)
                return self.last[1]
        raise UsageError(f"no file of {format_size(budget)} holds these targets")

    def _measured(self, made: Adapter, budget: int, asked: Reparameterize) -> Entrant:
        measured, family = self.bench.measured, self.family
        error, _ = errors(measured, made)
        ranks = [_rank(measured.delta(made, name)) for name in made.entries]
        known = [rank for rank in ranks if rank is not None]
        mean = math.fsum(known) / len(known) if len(known) == len(ranks) else None
        command = f"loratools reparameterize IN --to {family.family} --budget {asked.budget}B"
        command += " --base BASE" if family.fits_with_base else ""
        command += f" --dtype {asked.dtype}" if asked.dtype else ""
        command += f" --seed {asked.seed}" if asked.seed else ""
        command += " --accept-loss" if error > LOSSY else ""
        kept = max(0.0, 1 - error**2)
        return Entrant(family.family, budget, size_of(made), error, kept, mean, family.guarantee, False, command)


def _reference(bench: _Bench) -> tuple[tuple[int, float], ...]:
    """The error that the best ranks of all targets together leave, by the bytes of their factors and a header.

    Components are taken in the order of what they give for their bytes, which is optimal as they fall within a target.
    """
    part = bench.measured.adapter
    item = _bytes_of(part, bench.how.dtype)
    gains: list[tuple[float, float, int]] = []  # (squared value for a byte, squared value, bytes)
    for source in bench.sources.values():
        cost = sum(source.shape) * item
        gains += [(value**2 / cost, value**2, cost) for value in spectrum(source.delta).tolist()]
    gains.sort(reverse=True)
    whole = math.fsum(square for _, square, _ in gains)
    plain = composed(part, dict(part.items()), names_of(part))  # in the dialect of all entrants
    room, kept = header_room(plain), 0.0
    curve: list[tuple[int, float]] = []
    for count, (_, square, cost) in enumerate(gains, 1):
        room, kept = room + cost, kept + square
        is_next = len(gains) <= _CURVE or not curve or room >= _STEP * curve[-1][0] or count == len(gains)
        if whole and is_next:
            curve.append((room, math.sqrt(max(0.0, 1 - kept / whole))))
    return tuple(curve)


def _bytes_of(part: Adapter, dtype: str | None) -> int:
    if dtype is not None:
        return 4 if dtype == "f32" else 2
    return max(DTYPES[spec.dtype][1] // 8 for entry in part.entries.values() for spec in entry.specs.values())


def _rank(op: Operator) -> int | None:
    if isinstance(op, LowRank):
        values = spectrum(op)
    elif min(op.shape) > _RANKED:
        return None
    else:
        dense = op.dense() if op.shape[0] <= op.shape[1] else op.dense().T
        # Values below a millionth of the largest are rounded away in the Gram matrix, and are not to be counted.
        values = torch.linalg.eigvalsh(dense @ dense.T).clamp(min=0).sqrt()
    top = float(values.max()) if len(values) else 0.0
    return int((values > _SEEN * top).sum()) if top else 0


def _ranked(entrants: Sequence[Entrant]) -> tuple[Entrant, ...]:
    """By budget and error, with the best of each budget marked."""
    ordered = sorted(entrants, key=lambda e: (-e.budget, e.relative_error, e.bytes))
    least = {e.budget: e.relative_error for e in reversed(ordered)}
    return tuple(replace(e, best=e.relative_error == least[e.budget]) for e in ordered)
