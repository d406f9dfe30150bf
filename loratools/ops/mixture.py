"""Several adapters at once, as a mixture of experts: what they share, and one adapter in place of a routed set.

ReMix (arXiv 2603.10160) routes to k experts of equal, constant weight; whether that weight is 1 / k or 1 is not stated
where we could read it, so it is a choice here. The merge of a set is exact, at the sum of the ranks, and may be
squeezed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from loratools._lazy import torch
from loratools.errors import UsageError
from loratools.linalg.inner import cosine, frobenius
from loratools.linalg.norms import effective_rank, stable_rank
from loratools.linalg.subspace import overlap
from loratools.linalg.svd import spectrum, thin_svd
from loratools.operators import Dense, LowRank, Operator, sum_of
from loratools.ops.inspect import places
from loratools.ops.matching import matched
from loratools.ops.merge import Merge, deltas_of, merge
from loratools.ops.merge_checks import check_compatible, name_of
from loratools.ops.merge_methods import weighted_sum
from loratools.ops.merge_output import Job, draft_of
from loratools.ops.routing import Routing, leading_experts, router_report
from loratools.reports.mixture import MixtureReport, MixtureTarget
from loratools.storage.safetensors import SafetensorsSink

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.ops.statistics import Statistics
    from loratools.ranks import Policy
    from loratools.reports.merge import MergeReport

Weighting = Literal["mean", "sum"]
ALIKE = 0.9  # overlap of two experts, above which they are said to be one
REDUNDANT = 0.5
_RANK = 1e-10  # of the largest singular value: what is below is rounding


@dataclass(frozen=True)
class Mixture:
    """How experts are mixed.

    The `top_k` of most routing mass are kept, layer by layer or, with `one_set`, the same everywhere; each has the
    weight 1 / k (`mean`) or 1 (`sum`). `statistics`, those of the first adapter, weigh what equal weights change.
    """

    top_k: int | None = None
    one_set: bool = False
    weighting: Weighting = "mean"
    statistics: Statistics | None = None
    options: Merge = Merge()

    def __post_init__(self) -> None:
        if self.weighting not in get_args(Weighting):
            raise UsageError(f"no weighting {self.weighting!r}; choose mean or sum")


def merge_route_set(
    experts: Sequence[Adapter],
    chosen: Sequence[int] | Mapping[str, Sequence[int]],
    weighting: Weighting = "mean",
    rank: int | Policy | None = None,
    *,
    options: Merge = Merge(),
) -> tuple[Adapter, MergeReport]:
    """The experts of a routed set as one adapter: exact without a rank, else the best of that rank.

    `chosen` holds positions in `experts`, for all targets or for each target of the output. Each of the k chosen counts
    1 / k (`mean`) or 1 (`sum`). Raises UsageError for a set that is empty, repeats or exceeds the experts, and what
    `merge` raises.
    """
    if isinstance(chosen, Mapping):
        shares = {target: _equal(members, len(experts), weighting) for target, members in chosen.items()}
        return merge([(e, 1.0) for e in experts], rank, options=replace(options, shares=shares))
    weights = _equal(chosen, len(experts), weighting)
    kept = [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if weight]
    if len(kept) == 1:  # a merge takes two
        kept.append((kept[0][0], 0.0))
    return merge(kept, rank, options=options)


def mixture(
    experts: Sequence[Adapter], router: Routing | None = None, *, how: Mixture = Mixture()
) -> tuple[MixtureReport, dict[str, tuple[int, ...]]]:
    """What the mixture of the chosen experts amounts to, and which are chosen for each target.

    One target is in memory at a time. UsageError where a router's layers do not fit the targets, or a top-k is given
    without a router; AdapterError for experts that no merge would take.
    """
    if len(experts) < 2:
        raise UsageError("a mixture needs at least two adapters")
    if router is None and how.top_k is not None:
        raise UsageError("the top k of what? give the weights of a router with --router")
    for adapter in experts:
        adapter.require_weights()
    rows = matched(experts)
    warnings = check_compatible(experts, rows)
    _, jobs = draft_of(experts, rows, (), how.options.base)
    if router is not None and how.one_set:
        router = Routing(router.shares.mean(dim=1, keepdim=True))
    mass = None if router is None else _mass_of_targets(router, [job.name for job in jobs])
    count = len(experts)
    chosen: dict[str, tuple[int, ...]] = {}
    targets: dict[str, MixtureTarget] = {}
    pairs = _Pairs(count)
    for job in jobs:
        deltas, _ = deltas_of(experts, job, how.options)
        own = None if mass is None else mass[job.name]
        everyone = tuple(range(count))
        chosen[job.name] = everyone if own is None or how.top_k is None else leading_experts(own, how.top_k)
        targets[job.name] = _target(experts, job, deltas, chosen[job.name], own, how, pairs)
    report = None if router is None else router_report(router, how.top_k)
    names = tuple(name_of(adapter, i) for i, adapter in enumerate(experts))
    overlaps, cosines = pairs.means(pairs.overlaps), pairs.means(pairs.cosines)
    total = _totals(targets)
    warnings += _collapse(names, overlaps, total)
    if report is not None and (dead := [i for i, row in enumerate(report.layers) if row.is_collapsed]):
        warnings.append(
            f"the router has collapsed in {len(dead)} of {len(report.layers)} layers, where fewer than 1.5 experts are "
            f"in use at once; first: layer {dead[0]}"
        )
    return MixtureReport(names, how.weighting, targets, overlaps, cosines, report, total, tuple(warnings)), chosen


def routing_prototypes(experts: Sequence[Adapter]) -> Iterator[tuple[str, Tensor]]:
    """Arrow's prototypes (arXiv 2405.11157): (target, (experts, n)), the first right singular vector of each delta.

    A row is zero where an expert lacks the target or does nothing there. The sign of a vector means nothing: Arrow
    routes by |cos(x, prototype)|. As they are computed exactly, PEFT's power iteration comes close to them.
    """
    rows = matched(experts)
    _, jobs = draft_of(experts, rows, (), None)
    for job in jobs:
        deltas, _ = deltas_of(experts, job, Merge())
        found = torch.zeros(len(experts), deltas[0].shape[1], dtype=torch.float64)
        for (i, _), delta in zip(job.sources, deltas, strict=True):
            _, s, vt = thin_svd(delta)
            if len(s) and float(s[0]) > 0:
                found[i] = vt[0]
        yield job.name, found


def write_prototypes(experts: Sequence[Adapter], path: Path) -> Path:
    """Write `routing_prototypes` as one safetensors file, a tensor of float32 for each target."""
    with SafetensorsSink(path) as sink:
        for target, found in routing_prototypes(experts):
            sink.write(target, found.float())
        sink.commit({"format": "pt", "experts": json.dumps([name_of(a, i) for i, a in enumerate(experts)])})
    return path


def _equal(chosen: Sequence[int], count: int, weighting: Weighting) -> tuple[float, ...]:
    members = sorted(set(chosen))
    if not members or len(members) != len(chosen) or members[0] < 0 or members[-1] >= count:
        raise UsageError(f"experts {list(chosen)} of {count}: give distinct positions from 0 to {count - 1}")
    weight = 1 / len(members) if weighting == "mean" else 1.0
    return tuple(weight if i in members else 0.0 for i in range(count))


def _mass_of_targets(router: Routing, targets: Sequence[str]) -> dict[str, Tensor]:
    """The routing mass that holds for each target: that of its layer, or of the only row."""
    mass = router.mass
    found = places(targets)
    layers = sorted({layer for layer, _ in found.values()}, key=lambda layer: (not layer.isdecimal(), _natural(layer)))
    if len(mass) == 1:
        return dict.fromkeys(targets, mass[0])
    if len(mass) == len(layers):
        at = {layer: i for i, layer in enumerate(layers)}
        return {target: mass[at[layer]] for target, (layer, _) in found.items()}
    raise UsageError(
        f"the router has {len(mass)} layers and the adapters {len(layers)}, so it is not known which is which; with "
        "--one-set, the mean over its layers chooses for all"
    )


def _natural(layer: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in layer.split(".")]


def _target(
    experts: Sequence[Adapter],
    job: Job,
    deltas: Sequence[Operator],
    chosen: tuple[int, ...],
    mass: Tensor | None,
    how: Mixture,
    pairs: _Pairs,
) -> MixtureTarget:
    holders = [i for i, _ in job.sources]
    ranks: list[int | None] = [None] * len(experts)
    for i, target in job.sources:
        ranks[i] = experts[i].entries[target].rank
    weights = _equal(chosen, len(experts), how.weighting)
    equal = _mixed(deltas, [weights[i] for i in holders])
    values = spectrum(equal).tolist()
    rank = sum(v > _RANK * values[0] for v in values) if values and values[0] > 0 else 0
    columns = sum(ranks[i] or 0 for i in holders if i in chosen)
    directions = [_directions(delta) for delta in deltas]
    own = [
        pairs.add(i, j, directions[a], directions[b], cosine(deltas[a], deltas[b]))
        for a, i in enumerate(holders)
        for b, j in enumerate(holders[:a])
        if i in chosen and j in chosen
    ]
    change = weighted = None
    if mass is not None:
        # equal weights share out what the routed ones had: the mass of a mean is 1, that of a sum k
        routed = _mixed(deltas, [float(mass[i]) * sum(weights) for i in holders])
        change = _distance(routed, equal)
        if how.statistics is not None and (seen := _inputs(how.statistics, job)) is not None:
            weighted = _distance(_seen(routed, seen), _seen(equal, seen))
    return MixtureTarget(
        tuple(ranks),
        tuple(i + 1 for i in chosen),
        rank,
        effective_rank(values),
        stable_rank(values),
        1 - rank / columns if columns else 0.0,
        math.fsum(own) / len(own) if own else None,
        change,
        weighted,
    )


def _mixed(deltas: Sequence[Operator], weights: Sequence[float]) -> Operator:
    kept = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if weight]
    if not kept:
        return deltas[0] * 0.0
    return weighted_sum([delta for delta, _ in kept], [weight for _, weight in kept]).operator


def _distance(one: Operator, other: Operator) -> float | None:
    norm = frobenius(one)
    return frobenius(sum_of([one, -other])) / norm if norm else None


def _inputs(statistics: Statistics, job: Job) -> Tensor | None:
    """sqrt(E[x_j^2]) of what enters a target; None where the first adapter lacks it."""
    first = next((target for i, target in job.sources if i == 0), None)
    return None if first is None or first not in statistics.means else statistics.channels(first).double().sqrt()


def _seen(delta: Operator, inputs: Tensor) -> Operator:
    if isinstance(delta, LowRank):
        return LowRank(delta.left, delta.right * inputs, delta.scale)
    return Dense(delta.dense() * inputs)


def _directions(delta: Operator) -> Tensor:
    """An orthonormal basis of what a delta writes to."""
    u, s, _ = thin_svd(delta)
    return u[:, s > _RANK * s[:1]] if len(s) and float(s[0]) > 0 else u[:, :0]


class _Pairs:
    """Sums over targets of what two experts have in common."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.overlaps: dict[tuple[int, int], list[float]] = {}
        self.cosines: dict[tuple[int, int], list[float]] = {}

    def add(self, i: int, j: int, a: Tensor, b: Tensor, cos: float) -> float:
        shared = overlap(a, b)
        self.overlaps.setdefault((min(i, j), max(i, j)), []).append(shared)
        if math.isfinite(cos):
            self.cosines.setdefault((min(i, j), max(i, j)), []).append(cos)
        return shared

    def means(self, found: Mapping[tuple[int, int], list[float]]) -> tuple[tuple[float | None, ...], ...]:
        def mean(i: int, j: int) -> float | None:
            values = found.get((min(i, j), max(i, j)))
            return 1.0 if i == j else math.fsum(values) / len(values) if values else None

        return tuple(tuple(mean(i, j) for j in range(self.count)) for i in range(self.count))


def _totals(targets: Mapping[str, MixtureTarget]) -> dict[str, float | int | None]:
    rows = list(targets.values())

    def mean(name: str) -> float | None:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        return math.fsum(values) / len(values) if values else None

    names = ("rank", "effective_rank", "stable_rank", "redundancy", "overlap", "change", "weighted_change")
    return {"targets": len(rows)} | {name: mean(name) for name in names}


def _collapse(
    names: Sequence[str], overlaps: Sequence[Sequence[float | None]], total: Mapping[str, float | int | None]
) -> list[str]:
    found = []
    for i in range(len(names)):
        for j in range(i):
            shared = overlaps[i][j]
            if shared is not None and shared > ALIKE:
                found.append(
                    f"{names[j]} and {names[i]} share {shared:.2f} of their directions: nearly one expert twice"
                )
    redundancy = total["redundancy"]
    if redundancy is not None and redundancy > REDUNDANT:
        found.append(f"{redundancy:.2f} of the ranks are redundant: fewer experts, or smaller ones, would do the same")
    return found
