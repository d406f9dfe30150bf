"""The report of a serving plan, from what was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loratools.hub.footprint import Footprint, stored_numbers
from loratools.hub.plan_commands import Group, commands_of, groups_of
from loratools.hub.popularity import Popularity, drawn
from loratools.hub.population import Population
from loratools.hub.residency import lru_estimate, lru_hits, static_hits
from loratools.ops.check import server_named
from loratools.reports.hub_plan import Bucket, HubPlanReport, Planned, Policy, Unfit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loratools.hub.plan import Plan

_TOP = 10
_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class Candidates:
    """The adapters that a server can hold together: `fit` are their places, `shares` what each has of their requests.

    `reasons` are places in `texts` for every adapter of the population, and -1 for those that fit.
    """

    population: Population
    base: str
    memory: Footprint
    reasons: NDArray[np.int64]
    texts: tuple[str, ...]
    fit: NDArray[np.int64]
    popularity: Popularity
    shares: NDArray[np.float64]

    def places(self) -> NDArray[np.int64]:
        """For every adapter of the population its place among those that fit, or -1."""
        found = np.full(len(self.reasons), -1)
        found[self.fit] = np.arange(len(self.fit))
        return found


@dataclass(frozen=True, eq=False)
class Served:
    """For each adapter that fits: the place of its bucket, the error, what it takes of memory, and whether it stays."""

    buckets: tuple[int, ...]
    places: NDArray[np.int64]
    errors: NDArray[np.float64]
    sizes: NDArray[np.int64]
    capacity: int
    kept: NDArray[np.bool_]
    bound: float


def report_of(chosen: Candidates, served: Served, how: Plan) -> HubPlanReport:
    """Everything that the plan tells."""
    population, memory, reasons, texts = chosen.population, chosen.memory, chosen.reasons, chosen.texts
    fit, popularity, shares = chosen.fit, chosen.popularity, chosen.shares
    own = population.ranks[fit]
    ends = np.asarray(served.buckets)[served.places]
    total = popularity.weights.sum() + popularity.unknown
    trace, traced = _trace(chosen, how)
    buckets = tuple(_buckets(chosen, served))
    numbers = np.array([stored_numbers(s) for s in population.signatures], np.int64)[population.shapes[fit]]
    padding = int(np.maximum(ends - own, 0).sum())
    used = int(served.sizes[served.kept].sum())
    row = server_named(how.server)
    groups = groups_of(population, fit, ends, reasons)

    def planned(place: int, at: int) -> Planned:
        """The adapter at a place of the population, and `at` among those that fit, -1 where it does not."""
        name, rank = population.name(place), int(population.ranks[place])
        weight = float(popularity.weights[place] / total)
        if at < 0:
            return Planned(name, rank, "unfit", None, None, 0, weight, False, texts[reasons[place]])
        end = int(ends[at])
        action = "squeeze" if end < rank else "pad" if end > rank else "keep"
        size = int(served.sizes[at]) * memory.unit_bytes
        return Planned(name, rank, action, end, float(served.errors[at]), size, weight, bool(served.kept[at]))

    def every() -> Iterator[Planned]:
        for place, at in enumerate(chosen.places().tolist()):
            yield planned(place, at)

    top = np.argsort(-shares, kind="stable")[: _TOP if how.log is not None else 0]
    top = top[shares[top] > 0]
    return HubPlanReport(
        source=population.source,
        server=how.server,
        title=row.title,
        base_model=chosen.base,
        adapters=len(reasons),
        fit=len(fit),
        mended=int(population.mended[fit].sum()),
        unfit=unfit(population, reasons, texts),
        memory=how.memory,
        unit_bytes=memory.unit_bytes,
        capacity=served.capacity,
        reserve_tokens=how.reserve_tokens,
        facts={**memory.facts, "bytes_per_rank": memory.bytes_per_rank},
        buckets=buckets,
        waste=padding / int(ends.sum()),
        one_bucket_waste=1 - float(np.minimum(own, ends).sum()) / (len(fit) * int(ends.max())),
        largest_error=how.largest_error,
        resident=int(served.kept.sum()),
        used=used,
        displaced_tokens=used if how.server == "slora" else 0,
        host_bytes=int((np.minimum(own, ends) * numbers).sum()) * 2,
        bound=served.bound,
        popularity=popularity.stated,
        elsewhere=float((popularity.weights.sum() - popularity.weights[fit].sum()) / total),
        unknown=float(popularity.unknown / total),
        unknown_names=popularity.unknown_names,
        requests=len(trace),
        trace=traced,
        seed=how.seed,
        policies=_policies(chosen, served, trace),
        top=tuple(planned(int(fit[i]), i) for i in top.tolist()),
        settings=_settings(how, memory, buckets, served),
        commands=tuple(commands_of(groups, population.source, _hub(population, how), how)),
        warnings=tuple(_warnings(population, how, groups)),
        every=every,
        groups=groups,
    )


def _trace(chosen: Candidates, how: Plan) -> tuple[NDArray[np.int64], str]:
    """Places among those that fit, and what they are."""
    if chosen.popularity.trace is None:
        return drawn(chosen.shares, how.requests, how.seed), "independent requests"
    asked = chosen.places()[chosen.popularity.trace]
    return asked[asked >= 0][: how.requests], "as the log has them"


def _buckets(chosen: Candidates, served: Served) -> Iterator[Bucket]:
    own, shares, memory = chosen.population.ranks[chosen.fit], chosen.shares, chosen.memory
    for i, rank in enumerate(served.buckets):
        inside = served.places == i
        ranks, kept = own[inside], int(served.kept[inside].sum())
        squeezed = ranks > rank
        if not len(ranks):
            continue
        setting = f"--max-lora-rank {rank} --max-loras {kept} --max-cpu-loras {len(ranks)}" if memory.pads else ""
        yield Bucket(
            rank=rank,
            adapters=len(ranks),
            padded=int((ranks < rank).sum()),
            squeezed=int(squeezed.sum()),
            waste=float(np.maximum(rank - ranks, 0).sum() / (rank * len(ranks))),
            bytes=rank * len(ranks) * memory.bytes_per_rank,
            saved_bytes=int(np.maximum(ranks - rank, 0).sum()) * memory.bytes_per_rank,
            largest_error=float(served.errors[inside].max()) if squeezed.any() else None,
            resident=kept,
            requests=float(shares[inside].sum()),
            setting=setting if kept else "",
        )


def _policies(chosen: Candidates, served: Served, trace: NDArray[np.int64]) -> tuple[Policy, ...]:
    shares, memory = chosen.shares, chosen.memory
    if memory.pads:  # each bucket is a server with slots of its own
        pools = served.places
        capacities = np.bincount(pools, weights=served.sizes * served.kept, minlength=len(served.buckets))
        capacities = capacities.astype(np.int64)
    else:
        pools, capacities = np.zeros(len(shares), np.int64), np.array([served.capacity])
    there = np.flatnonzero(served.kept)
    first = there[np.argsort(shares[there], kind="stable")]  # the most popular last, as if used last
    counted = {
        "static": (float(shares[served.kept].sum()), static_hits(trace, served.sizes, served.kept)),
        "lru": (
            lru_estimate(shares, served.sizes, pools, capacities),
            lru_hits(trace, served.sizes, pools, capacities, first),
        ),
    }
    return tuple(
        Policy(name, expected, c.hit_rate, c.evictions, c.requests - c.hits, c.loaded * memory.unit_bytes)
        for name, (expected, c) in counted.items()
    )


def unfit(population: Population, reasons: NDArray[np.int64], texts: Sequence[str]) -> tuple[Unfit, ...]:
    """The reasons, the most frequent first."""
    counts = np.bincount(reasons[reasons >= 0], minlength=len(texts))
    found = []
    for i in sorted(range(len(texts)), key=lambda i: (-counts[i], texts[i])):
        if counts[i]:
            examples = np.flatnonzero(reasons == i)[:_EXAMPLES].tolist()
            found.append(Unfit(texts[i], int(counts[i]), tuple(map(population.name, examples))))
    return tuple(found)


def _settings(how: Plan, memory: Footprint, buckets: tuple[Bucket, ...], served: Served) -> tuple[str, ...]:
    """What to start the servers with."""
    if memory.pads:
        return tuple(bucket.setting for bucket in buckets if bucket.setting)
    tokens = f"--max_total_token_num {how.reserve_tokens} " if how.reserve_tokens else ""
    return (f"{tokens}--pool-size-lora {served.capacity} --swap",)


def _hub(population: Population, how: Plan) -> Path | None:
    """The folder to run commands on; of a catalog only its user knows it."""
    source = Path(population.source)
    return source if how.hub is None and source.is_dir() else how.hub


def _warnings(population: Population, how: Plan, groups: tuple[Group, ...]) -> Iterator[str]:
    if population.caveat:
        yield population.caveat
    if groups and _hub(population, how) is None:
        yield "HUB stands for the folder that the catalog is of; --hub names it"
    if how.server == "slora" and not how.reserve_tokens:
        yield "no tokens are reserved for the cache, which shares the memory; give --reserve-tokens"
    if how.server == "vllm":
        yield (
            "slots are counted for the modules that some adapter has; vLLM sets them aside for every module it can put "
            "an adapter on"
        )
