"""One adapter's deltas through every family, at equal bytes on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError, LoratoolsError, UsageError
from loratools.families import FITTABLE, fittable
from loratools.linalg.svd import spectrum
from loratools.operators import LowRank
from loratools.ops.reparameterize import Reparameterize, file_bytes, reparameterize
from loratools.ops.spectra import base_tensor
from loratools.pipeline import ordered_map, worker_count
from loratools.reports.bakeoff import BakeoffReport, Entrant
from loratools.sizes import format_size
from loratools.storage.base import DTYPES

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.families import Fittable
    from loratools.operators import Operator
    from loratools.reports.reparameterize import ReparameterizeReport

SHARES = (2, 4, 8, 16)  # by which the adapter's own bytes are divided where no budget is given
SAMPLE = 8  # targets
_TRIES = 6
_RANKED = 1024  # smaller side up to which a dense delta is asked for its rank
_CURVE = 64  # points of the reference
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
    """
    families = [fittable(name) for name in how.families] if how.families else list(FITTABLE.values())
    chosen = _chosen(adapter, how)
    part = replace(adapter, entries={target: adapter.entries[target] for target in chosen}, extras={})
    own = sum(entry.nbytes for entry in part.entries.values())
    budgets = sorted(how.budgets or {own // share for share in SHARES}, reverse=True)
    jobs = [(family, budget) for budget in budgets for family in families]
    step = steps(len(jobs), "fits") if steps else lambda: None

    def work(job: tuple[type[Fittable], int]) -> Entrant | tuple[str, str]:
        family, budget = job
        try:
            return _entered(part, family, budget, how)
        except LoratoolsError as problem:
            return family.family, str(problem)
        finally:
            step()

    found = list(ordered_map(work, jobs, workers=worker_count("cpu")))
    entrants = [outcome for outcome in found if isinstance(outcome, Entrant)]
    left_out: dict[str, str] = {}
    for outcome in found:
        if not isinstance(outcome, Entrant):
            left_out.setdefault(*outcome)
    if not entrants:
        raise AdapterError(f"no family could be fitted: {next(iter(left_out.values()))}")
    reference = _reference(part, how)
    return BakeoffReport(chosen, _ranked(entrants), reference, left_out, adapter.warnings)


def _chosen(adapter: Adapter, how: Bakeoff) -> tuple[str, ...]:
    targets = list(adapter.entries) if how.targets is None else list(adapter.select(how.targets))
    if how.targets is not None or not how.sample or len(targets) <= how.sample:
        return tuple(targets)
    spread = [round(i * (len(targets) - 1) / (how.sample - 1)) for i in range(how.sample)] if how.sample > 1 else [0]
    return tuple(targets[i] for i in spread)


def _entered(part: Adapter, family: type[Fittable], budget: int, how: Bakeoff) -> Entrant:
    """The family at most at `budget`: what its file takes beside the numbers is taken off until it fits."""
    room = budget
    for _ in range(_TRIES):
        asked = Reparameterize(budget=max(room, 0), base=how.base, dtype=how.dtype, seed=how.seed, accept_loss=True)
        try:
            made, report = reparameterize(part, family.family, asked)
        except UsageError:
            break
        size = file_bytes(made)
        if size <= budget:
            return _measured(made, report, family, budget, room, how)
        room -= size - budget
    raise UsageError(f"no file of {format_size(budget)} holds these targets")


def _measured(
    made: Adapter, report: ReparameterizeReport, family: type[Fittable], budget: int, room: int, how: Bakeoff
) -> Entrant:
    error = float(report.total["relative_error"] or 0.0)
    ranks = [_rank(made[name].operator(_weight(made, name, how))) for name in made]
    known = [rank for rank in ranks if rank is not None]
    mean = math.fsum(known) / len(known) if len(known) == len(ranks) and known else None
    command = f"loratools reparameterize IN --to {family.family} --budget {room}B"
    kept = max(0.0, 1 - error**2)
    return Entrant(family.family, budget, file_bytes(made), error, kept, mean, family.guarantee, False, command)


def _reference(part: Adapter, how: Bakeoff) -> tuple[tuple[int, float], ...]:
    """The error that the best ranks of all targets together leave, by the bytes of their factors and a header.

    Components are taken in the order of what they give for their bytes, which is optimal as they fall within a target.
    """
    item = _bytes_of(part, how.dtype)
    gains: list[tuple[float, float, int]] = []  # (squared value for a byte, squared value, bytes)
    for target, entry in part.entries.items():
        op = entry.read().operator(base_tensor(part, target, entry, how.base)).to(torch.float64)
        cost = sum(op.shape) * item
        gains += [(value**2 / cost, value**2, cost) for value in spectrum(op).tolist()]
    gains.sort(reverse=True)
    whole = math.fsum(square for _, square, _ in gains)
    room, kept, curve = file_bytes(part) - part.nbytes, 0.0, []
    for count, (_, square, cost) in enumerate(gains, 1):
        room, kept = room + cost, kept + square
        if whole and (count % max(1, len(gains) // _CURVE) == 0 or count == len(gains)):
            curve.append((room, math.sqrt(max(0.0, 1 - kept / whole))))
    return tuple(curve)


def _bytes_of(part: Adapter, dtype: str | None) -> int:
    if dtype is not None:
        return 4 if dtype == "f32" else 2
    return max(DTYPES[spec.dtype][1] // 8 for entry in part.entries.values() for spec in entry.specs.values())


def _weight(made: Adapter, name: str, how: Bakeoff) -> torch.Tensor | None:
    if not made.entries[name].needs_base or how.base is None:
        return None
    return how.base.find(made.format.parameter(name), made.entries[name].base_shape)


def _rank(op: Operator) -> int | None:
    if not isinstance(op, LowRank) and min(op.shape) > _RANKED:
        return None
    values = spectrum(op.to(torch.float64))
    top = float(values[0]) if len(values) else 0.0
    return int((values > _SEEN * top).sum()) if top else 0


def _ranked(entrants: Sequence[Entrant]) -> tuple[Entrant, ...]:
    """By budget and error, with the best of each budget marked."""
    ordered = sorted(entrants, key=lambda e: (-e.budget, e.relative_error, e.bytes))
    least = {e.budget: e.relative_error for e in reversed(ordered)}
    return tuple(replace(e, best=e.relative_error == least[e.budget]) for e in ordered)
