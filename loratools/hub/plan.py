"""A serving plan for a whole hub: who can be served, at which ranks, who stays in memory, and what that is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loratools.errors import AdapterError, UsageError
from loratools.hub.buckets import bucket_of, rank_buckets
from loratools.hub.footprint import OTHER_MODEL, PLANNED, footprint
from loratools.hub.plan_report import Candidates, Served, report_of, unfit
from loratools.hub.popularity import Popularity, read_log, zipf
from loratools.hub.population import Population, Steps, population_of_hub
from loratools.hub.residency import most_popular
from loratools.ops.check import server_named
from loratools.sizes import format_size
from loratools.storage.header import quoted

if TYPE_CHECKING:
    from loratools.reports.hub_plan import HubPlanReport

_REASONS = 3  # why none can be served
_MOST_REQUESTS = 10_000_000
_NAMED = 3  # base models
_OTHER_BASE = "it is of another base model; choose with --base"


@dataclass(frozen=True)
class Plan:
    """What is planned for.

    `memory`: bytes for adapters, and for S-LoRA for the cache too, of which `reserve_tokens` stay free. `base`: a glob
    for the base model, by default the one of most adapters. `log`: the popularity, else Zipf with exponent `zipf`.
    `by_popularity`: choose buckets by the padding of requests, and not of adapters. `largest_error`: squeeze to a lower
    bucket where singular values say that no more is lost. `hub`: what a catalog is of, for the commands; `lists`: the
    folder where these find the names of the adapters that they are for, which `plan_commands.write_lists` writes.
    """

    server: str
    memory: int
    buckets: int = 4
    base: str | None = None
    log: Path | None = None
    by_popularity: bool = False
    largest_error: float | None = None
    reserve_tokens: int = 0
    requests: int = 100_000
    zipf: float = 1.0
    seed: int = 0
    hub: Path | None = None
    lists: Path | None = None

    def __post_init__(self) -> None:
        if self.server not in PLANNED:
            raise UsageError(f"no plan for {self.server!r}; there are {', '.join(PLANNED)}")
        if self.largest_error is not None and not 0 <= self.largest_error < 1:
            raise UsageError(f"--max-error {self.largest_error:g}: give a relative error from 0 to below 1")
        if self.reserve_tokens < 0 or (self.reserve_tokens and self.server != "slora"):
            raise UsageError("--reserve-tokens is for S-LoRA, whose cache shares the memory; give 0 or more")
        if not 1 <= self.requests <= _MOST_REQUESTS:
            raise UsageError(f"--requests {self.requests}: give at least 1, and at most {_MOST_REQUESTS}")


def plan(path: Path, how: Plan, *, steps: Steps | None = None) -> HubPlanReport:
    """The plan for a hub, from its headers, or from a catalog of it, a Parquet file.

    Raises InputError for what cannot be read, AdapterError where no adapter can be served, and UsageError where the
    memory holds none of them.
    """
    if path.is_dir():
        population = population_of_hub(path, how.server, steps=steps)
    else:
        from loratools.hub.population_catalog import population_of_catalog

        population = population_of_catalog(path, how.server, steps=steps)
    return plan_for(population, how)


def plan_for(population: Population, how: Plan) -> HubPlanReport:
    """As `plan`, for adapters that are known already."""
    chosen = _candidates(population, how)
    served = _serve(chosen, how)
    return report_of(chosen, served, how)


def _candidates(population: Population, how: Plan) -> Candidates:
    """Those that the server can hold together; AdapterError where there are none, or nobody asks for them."""
    texts = [*population.reason_texts, _OTHER_BASE, OTHER_MODEL]
    reasons = population.reasons.copy()
    counts = np.bincount(population.bases[reasons < 0], minlength=len(population.base_names))
    if how.base is None:
        chosen = counts == counts.max(initial=0)
        chosen &= np.cumsum(chosen) == 1  # the first of the most frequent ones
    else:
        chosen = np.array([fnmatchcase(name, how.base) for name in population.base_names], bool)
        if not chosen.any():
            raise UsageError(f"no adapter has a base model like {how.base!r}; there is {_some(population.base_names)}")
    reasons[(reasons < 0) & ~chosen[population.bases]] = len(texts) - 2
    numbers = np.bincount(population.shapes[reasons < 0], minlength=len(population.signatures))
    order = [i for i in np.argsort(-numbers, kind="stable").tolist() if numbers[i]]
    if not order:
        why = "; ".join(f"{u.count}: {u.reason}" for u in unfit(population, reasons, texts)[:_REASONS])
        title = server_named(how.server).title
        raise AdapterError(
            f"{title} can serve none of {len(reasons)} adapters of {population.source}" + (f" ({why})" if why else "")
        )
    memory, others = footprint(how.server, [population.signatures[i] for i in order])
    foreign = np.array([s in others for s in population.signatures], bool)
    reasons[(reasons < 0) & foreign[population.shapes]] = len(texts) - 1
    names = [name for name, yes in zip(population.base_names, chosen.tolist(), strict=True) if yes]
    fit = np.flatnonzero(reasons < 0)
    popularity = _popularity(population, how)
    known = popularity.weights[fit]
    if known.sum() <= 0:
        raise AdapterError("no request of the log is for an adapter that can be served")
    base = ", ".join(names[:_NAMED])
    return Candidates(population, base, memory, reasons, tuple(texts), fit, popularity, known / known.sum())


def _some(names: Sequence[str]) -> str:
    known = [quoted(name) for name in names if name]
    return ", ".join(known[:_NAMED]) + (", ..." if len(known) > _NAMED else "") if known else "none that is named"


def _popularity(population: Population, how: Plan) -> Popularity:
    if how.log is not None:
        return read_log(how.log, population.names)
    return zipf(len(population.ranks), how.zipf, how.seed)


def _serve(chosen: Candidates, how: Plan) -> Served:
    population, fit, shares, memory = chosen.population, chosen.fit, chosen.shares, chosen.memory
    own = population.ranks[fit]
    needed = own
    if how.largest_error is not None:
        if population.spectra is None:
            raise UsageError("--max-error needs singular values: plan from a catalog (loratools hub catalog)")
        found = population.spectra.needed(how.largest_error)[fit]
        needed = np.where(found > 0, np.minimum(found, own), own)
    weights = shares if how.by_popularity else np.ones(len(fit))
    allowed = server_named(how.server).max_ranks
    buckets = rank_buckets(needed, weights * memory.bytes_per_rank, how.buckets, allowed=allowed)
    places = bucket_of(needed, buckets)
    ends = np.asarray(buckets)[places]
    errors = np.zeros(len(fit))
    if how.largest_error is not None and (ends < own).any():
        assert population.spectra is not None  # or nothing would be squeezed
        at = population.ranks.copy()
        at[fit] = ends
        errors = np.where(ends < own, population.spectra.errors(at)[fit], 0.0)
    ranks = ends if memory.pads else np.minimum(ends, own)
    sizes = ranks * memory.units
    capacity = memory.capacity(how.memory, how.reserve_tokens)
    if capacity < sizes.min():
        smallest = int(ranks.min())
        raise UsageError(
            f"{format_size(how.memory)} of memory hold no adapter: one of rank {smallest} takes "
            f"{format_size(smallest * memory.bytes_per_rank)}"
            + (f" beside {how.reserve_tokens} reserved tokens" if how.reserve_tokens else "")
        )
    kept, bound = most_popular(shares, sizes, capacity)
    return Served(buckets, places, errors, sizes, capacity, kept, bound)
