"""What several fine-tunes of one base did to it, matrix by matrix: adapters, and models that were tuned whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.adapter import Adapter
from loratools.errors import AdapterError, UsageError, naming
from loratools.ops.base_spectra import TOLERANCE, BaseSpectrum, Search
from loratools.ops.compare_numbers import (
    AgainstBase,
    Decomposed,
    decomposed,
    missed_by,
    pair_numbers,
    update_numbers,
)
from loratools.ops.compare_plan import Member, Plan, matrices_of, planned
from loratools.ops.compare_totals import fine_tune, pairs_over_all, with_shares
from loratools.ops.examine import examine, turn_freely
from loratools.ops.fine_tunes import FineTuneSource, fine_tune_of
from loratools.ops.initial import ON_THE_BASE, refuse_mutated
from loratools.ops.inspect import places
from loratools.ops.logit_growth import is_renormalised, logit_growth, norm_before, projection_of
from loratools.ops.overlap_maps import Spaces, overlap_maps, spaces_of
from loratools.reports.compare import ComparedTarget, CompareReport, UpdateNumbers
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.base_weights import BaseWeights
    from loratools.operators import Operator

MAX_OVERLAP_RANK = 64  # vectors of each space that pairs are compared in
_GROWTH = 1.5  # of the bound on attention's ingredients, above which there is a warning


def compare(
    base: BaseWeights,
    fine_tunes: Mapping[str, Adapter | FineTuneSource],
    *,
    top_k: int = 10,
    epsilon: float = 0.5,
    target: str | None = None,
    search: Search = Search(),
    step: Callable[[], None] | None = None,
) -> CompareReport:
    """Every number of `CompareReport` for the fine-tunes, by the names given, of one base.

    Updates meet at the base parameter that they change, whatever dialect names it; `target` is a shell pattern for its
    module. Matrices are read, compared and forgotten one by one, and only leading singular vectors are kept, for the
    maps. The first fine-tune that is a whole model is what the others may miss something of. `step` is called once for
    each target of each fine-tune. Raises AdapterError, naming fine-tune and target, for another base, NaN or infinity.
    """
    sources = {n: f if isinstance(f, FineTuneSource) else fine_tune_of(f) for n, f in fine_tunes.items()}
    _check(sources, top_k, epsilon)
    plan = planned(sources, base, target)
    _refuse_absent(sources, plan, target)
    where = places([parameter.removesuffix(".weight") for parameter in plan.parameters])
    settings = _Settings(top_k, epsilon, _reference(sources), search)
    targets: dict[str, ComparedTarget] = {}
    spaces: dict[str, dict[str, Spaces]] = {name: {} for name in sources}
    if step is not None:
        for _ in range(plan.left_alone):
            step()
    for job in plan.jobs:
        for parameter, weight, members in matrices_of(job, sources, base, plan, step):
            place = where[parameter.removesuffix(".weight")]
            targets[parameter], found = _compared(parameter, place, weight, members, base, settings)
            for name, own in found.items():
                spaces[name][parameter] = spaces_of(own)
    targets = with_shares(targets)
    pairs = pairs_over_all(targets, list(sources))
    return CompareReport(
        base=str(base.source.path),
        top_k=top_k,
        epsilon=epsilon,
        max_overlap_rank=MAX_OVERLAP_RANK,
        fine_tunes={n: fine_tune(str(s.path), s.kind, n, targets, settings.reference) for n, s in sources.items()},
        targets=targets,
        pairs=pairs,
        overlap_maps=tuple(overlap_maps(spaces, {p: (t.layer, t.module) for p, t in targets.items()})),
        skipped=plan.skipped,
        warnings=tuple(_warnings(sources, targets, base, top_k)),
    )


@dataclass(frozen=True)
class _Settings:
    top_k: int
    epsilon: float
    reference: str | None  # the fine-tune that others may miss something of
    search: Search


def _check(sources: Mapping[str, FineTuneSource], top_k: int, epsilon: float) -> None:
    if not sources:
        raise UsageError("no fine-tune to compare; give one at least")
    if top_k < 1:
        raise UsageError(f"top_k is {top_k}; look at one singular vector at least")
    if not 0 < epsilon <= 1:
        raise UsageError(f"an epsilon of {epsilon} is no cosine between 0 and 1")
    for source in sources.values():
        with naming(printable(source.path)):
            refuse_mutated(source.adapter, ON_THE_BASE)


def _reference(sources: Mapping[str, FineTuneSource]) -> str | None:
    return next((name for name, source in sources.items() if source.kind == "full"), None)


def _compared(
    parameter: str,
    place: tuple[str, str],
    weight: Tensor,
    members: Mapping[str, Member],
    base: BaseWeights,
    settings: _Settings,
) -> tuple[ComparedTarget, dict[str, Decomposed]]:
    device = settings.search.device
    known = BaseSpectrum(parameter, weight, settings.search)
    weight = weight.to(device, torch.float64)
    found = {
        name: decomposed(m.change, m.entry.rank if m.entry.is_factored else None, device) for name, m in members.items()
    }
    examined = _examined(known, {n: own.operator for n, own in found.items()}, settings.top_k, settings.epsilon)
    growths = _growths(parameter, weight, found, base)
    norm = float(weight.norm())
    full = found.get(settings.reference) if settings.reference is not None else None
    updates: dict[str, UpdateNumbers] = {}
    for name, own in found.items():
        updates[name] = update_numbers(
            own,
            members[name].entry.family.family,
            AgainstBase(norm, examined.left, examined.right, *examined.intruders[name]),
            stored_rank=members[name].entry.rank,
            gain=members[name].gain,
            growth=growths[name],
            missed=None if full is None or own is full else missed_by(own, full, str(settings.reference)),
        )
    pairs = tuple(pair_numbers((a, b), found[a], found[b], MAX_OVERLAP_RANK) for a, b in combinations(found, 2))
    values = tuple(examined.values.tolist())
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    return ComparedTarget(*place, shape, norm, values, updates, pairs), found


@dataclass(frozen=True, eq=False)
class _Examined:
    """The base's leading singular vectors, and the left and right intruders that each update makes."""

    values: Tensor  # of W0, descending
    left: Tensor  # (m, top_k) float64
    right: Tensor  # (n, top_k) float64
    intruders: Mapping[str, tuple[int, int]]


def _examined(base: BaseSpectrum, changes: Mapping[str, Operator], top_k: int, epsilon: float) -> _Examined:
    """What is known of W0 serves all changes."""
    intruders = {}
    for name, change in changes.items():
        found = examine(base, change, top_k=top_k, thresholds=(epsilon,))
        left, right = (int((side.most < epsilon).sum()) for side in (found.left, found.right))
        intruders[name] = (left, right)
    leading = base.leading(top_k, tolerance=TOLERANCE)
    count = min(top_k, *base.stored.shape)
    values = leading.s[: count + 1] * base.scale
    return _Examined(values, leading.u[:, :count].double(), leading.vt[:count].T.double(), intruders)


def _growths(
    parameter: str, weight: Tensor, found: Mapping[str, Decomposed], base: BaseWeights
) -> dict[str, float | None]:
    """Of the outputs of a query, key or value projection, by fine-tune; None where a norm takes it away."""
    if projection_of(parameter) is None or is_renormalised(base, parameter):
        return dict.fromkeys(found)
    norm = norm_before(base, parameter, int(weight.shape[1]))
    return {name: logit_growth(weight, own.operator, norm) for name, own in found.items()}


def _refuse_absent(sources: Mapping[str, FineTuneSource], plan: Plan, pattern: str | None) -> None:
    """AdapterError for a fine-tune that changes no matrix which could be compared."""
    present = {name for job in plan.jobs for name, _ in job}
    for name, source in sources.items():
        if name not in present:
            where = "no matrix that can be compared" if pattern is None else f"no matrix that matches {pattern!r}"
            why = next((f" ({t}: {r})" for t, r in plan.skipped.items() if t.startswith(f"{name}: ")), "")
            raise AdapterError(f"{printable(source.path)}: changes {where}{why}; leave it out, or choose other targets")


def _warnings(
    sources: Mapping[str, FineTuneSource], targets: Mapping[str, ComparedTarget], base: BaseWeights, top_k: int
) -> Iterator[str]:
    for name, source in sources.items():
        yield from (f"{name}: {warning}" for warning in source.adapter.warnings)
        if zero := [p for p, t in targets.items() if name in t.updates and not t.updates[name].norm]:
            yield f"{name}: {len(zero)} updates are zero, as before training; first: {zero[0]}"
    for a, b in combinations(sources, 2):
        if not any(a in t.updates and b in t.updates for t in targets.values()):
            yield f"{a} and {b} change no matrix in common"
    if degenerate := sum(turn_freely(t.base_values) for t in targets.values()):
        note = "base weights have nearly equal leading singular values, whose vectors turn freely: intruders there say"
        yield f"{degenerate} of {len(targets)} {note} little"
    if renormalised := sum(projection_of(p) is not None and is_renormalised(base, p) for p in targets):
        yield f"norms of queries and keys take any growth of {renormalised} projections away; it is not given"
    growths = [(p, n, u.logit_growth) for p, t in targets.items() for n, u in t.updates.items()]
    if grown := [f"{name}: {parameter}" for parameter, name, growth in growths if growth and growth > _GROWTH]:
        yield (
            f"the bound on the outputs of {len(grown)} query, key or value projections grows by more than "
            f"{_GROWTH:g}, a heuristic sign of larger logits; first: {grown[0]}"
        )
