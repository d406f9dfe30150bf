"""Copies, derivatives, merges and clusters of a hub: found by sketches, confirmed by exact inner products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loratools._lazy import torch
from loratools.errors import UsageError
from loratools.files import locate
from loratools.hub.comparing import MergeJob, PairJob, confirm, confirm_merge, merge_given_up, pairs_given_up
from loratools.hub.engines import local_executor, outcomes
from loratools.hub.mixtures import LEAST_TERM, mixtures
from loratools.hub.nearest import MOST, Candidates, candidates, unit
from loratools.hub.pairs import Regression, Shared
from loratools.hub.sketches import LENGTH
from loratools.hub.sketching import Member, members_of, queried, sketched_members
from loratools.reports.hub_similar import Cluster, HubSimilarReport, LeftOut, MergeFound, Related, Term

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.hub.sketching import Steps

_ALL_PAIRS = 10_000  # candidates up to which every one is compared exactly
_NEAREST = 3  # of each adapter, above
_TOGETHER = 8  # adapters that one is compared with at a time
Compared = dict[tuple[int, int], Shared]


@dataclass(frozen=True)
class Similar:
    """How to go about it.

    `threshold`: the least magnitude of a cosine that counts. `to`: rank the hub by its likeness to this adapter, and
    tell the `nearest` so many. `catalog`: sketches that are known already. `workers`: processes of this machine, or
    with an `executor` jobs in its hands at a time.
    """

    threshold: float = 0.95
    to: Path | None = None
    nearest: int = 20
    catalog: Path | None = None
    workers: int = 1
    executor: Callable[[], Executor] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UsageError(f"threshold {self.threshold} is not in (0, 1]: a cosine, such as 0.95")
        if self.workers < 1 or self.nearest < 1:
            raise UsageError(f"{self.workers} workers, nearest {self.nearest}: give at least 1 of each")

    def pool(self, jobs: int) -> Callable[[], Executor]:
        """What makes the workers for so many jobs."""
        return self.executor or (lambda: local_executor(min(self.workers, max(1, jobs))))


def similar(hub: Path, how: Similar = Similar(), *, steps: Steps | None = None) -> HubSimilarReport:
    """What the adapters of a hub are of each other, by their deltas: whatever the factors, rank, family and dialect.

    Sketching is linear in the adapters; every pair and merge that is reported has been compared exactly. Biases and
    tensors that belong to no update do not count, and are noted of copies. Raises InputError for a hub or catalog that
    cannot be read, and AdapterError where `to` has no delta of its own.
    """
    query = None if how.to is None else queried(how.to)
    known = members_of(hub, how.catalog)
    if how.to is not None:
        weights = locate(how.to)[0].resolve()
        known = [m for m in known if m.path is None or not _is_at(m.path, weights)]
    found = sketched_members(known, how.pool, how.workers, steps)
    good = [m for m in found if m.sketch is not None]
    left_out = [m for m in found if m.sketch is None]
    if query is not None:
        return _ranked(hub, how, query, good, left_out, steps)
    return _grouped(hub, how, good, left_out, steps)


def _is_at(path: Path, weights: Path) -> bool:
    """Whether the adapter at `path` is that of the weights file."""
    return path.resolve() in (weights, weights.parent)


def _ranked(
    hub: Path, how: Similar, query: Member, good: list[Member], left_out: list[Member], steps: Steps | None
) -> HubSimilarReport:
    members = [query, *good]
    units = _units(members)
    estimates = (units[1:] @ units[0]).abs()
    order = torch.sort(estimates, descending=True, stable=True).indices[: how.nearest].tolist()
    compared, failures = _confirmed(members, [(0, i + 1) for i in order], how, steps)
    pairs = [_related(members, pair, numbers, how.threshold) for pair, numbers in compared.items()]
    copies = {j for (_, j), s in compared.items() if s.relation(how.threshold) in ("copy", "scaled copy")}
    kept = [0, *(i for i in range(1, len(members)) if i not in copies)]
    merges, more = _merges(members, kept, {0}, units, how, steps)
    return _report(hub, how, len(good), pairs, merges, (), left_out, {**failures, **more}, ())


def _grouped(
    hub: Path, how: Similar, good: list[Member], left_out: list[Member], steps: Steps | None
) -> HubSimilarReport:
    units = _units(good)
    found = candidates(units, how.threshold, step=None if steps is None else lambda n: steps(n, "parts of the search"))
    compared, failures = _compared(good, found, how, steps)
    reported = {pair: s for pair, s in compared.items() if s.relation(how.threshold) != "other"}
    pairs = [_related(good, pair, numbers, how.threshold) for pair, numbers in reported.items()]
    pairs += _same_bytes(left_out)
    copies = Groups(len(good))
    for (i, j), numbers in reported.items():
        if numbers.relation(how.threshold) != "derivative":
            copies.join(i, j)
    kept = [i for i in range(len(good)) if copies.root(i) == i]
    suspects = {i for i in kept if float(found.best[i]) >= LEAST_TERM}
    merges, more = _merges(good, kept, suspects, units, how, steps)
    warnings = []
    if found.crowded:
        warnings.append(f"{found.crowded} adapters have more relatives than the {MOST} nearest that are kept of each")
    if (skipped := len(found.first) - len(compared) - len(failures)) > 0:
        warnings.append(
            f"{skipped} likely pairs within clusters were not compared: of so many, each adapter's {_NEAREST} nearest "
            "are, and what joins clusters"
        )
    return _report(hub, how, len(good), pairs, merges, _clusters(pairs), left_out, {**failures, **more}, warnings)


def _units(members: Sequence[Member]) -> Tensor:
    sketches = [m.sketch for m in members if m.sketch is not None]
    return unit(torch.from_numpy(np.stack(sketches))) if sketches else torch.zeros(0, LENGTH)


def _compared(
    members: Sequence[Member], found: Candidates, how: Similar, steps: Steps | None
) -> tuple[Compared, dict[str, str]]:
    """Every candidate exactly; of very many, the nearest of each adapter and what joins clusters."""
    likely = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    if len(likely) <= _ALL_PAIRS:
        return _confirmed(members, likely, how, steps)
    compared: Compared = {}
    failures: dict[str, str] = {}
    tried: set[tuple[int, int]] = set()
    degrees = [0] * len(members)
    while True:
        groups = Groups(len(members))
        for (i, j), numbers in compared.items():
            if abs(numbers.cosine) >= how.threshold:
                groups.join(i, j)
        chosen = []
        for i, j in likely:
            if (i, j) not in tried and (groups.join(i, j) or min(degrees[i], degrees[j]) < _NEAREST):
                chosen.append((i, j))
                degrees[i], degrees[j] = degrees[i] + 1, degrees[j] + 1
        if not chosen:
            return compared, failures
        tried.update(chosen)
        more, failed = _confirmed(members, chosen, how, steps)
        compared |= more
        failures |= failed


def _confirmed(
    members: Sequence[Member], pairs: Iterable[tuple[int, int]], how: Similar, steps: Steps | None
) -> tuple[Compared, dict[str, str]]:
    """The exact numbers of pairs, in their order, and why some have none, by name."""
    wanted = list(pairs)
    by_first: dict[int, list[int]] = {}
    for i, j in wanted:
        by_first.setdefault(i, []).append(j)
    jobs = [
        PairJob(i, _path(members, i), tuple((j, _path(members, j)) for j in others[start : start + _TOGETHER]))
        for i, others in sorted(by_first.items())
        for start in range(0, len(others), _TOGETHER)
    ]
    step = steps(len(jobs), "adapters compared exactly") if steps and jobs else lambda: None
    found: Compared = {}
    failures: dict[str, str] = {}
    if jobs:
        for results in outcomes(how.pool(len(jobs)), confirm, jobs, workers=how.workers, given_up=pairs_given_up):
            for i, j, numbers in results:
                if isinstance(numbers, Shared):
                    found[i, j] = numbers
                else:
                    failures[f"{members[i].name} and {members[j].name}"] = numbers
            step()
    return {pair: found[pair] for pair in wanted if pair in found}, failures


def _merges(
    members: Sequence[Member], kept: Sequence[int], suspects: set[int], units: Tensor, how: Similar, steps: Steps | None
) -> tuple[list[MergeFound], dict[str, str]]:
    """Suspects that are sums of others; only `kept` ones, of which no two are copies, count."""
    places = [place for place, i in enumerate(kept) if i in suspects]
    likely = mixtures(units[list(kept)], places, how.threshold) if len(kept) > 2 and places else []
    if how.to is not None:
        likely = [m for m in likely if kept[m.row] == 0]
    jobs = [
        MergeJob(kept[m.row], _path(members, kept[m.row]), tuple((kept[t], _path(members, kept[t])) for t in m.terms))
        for m in likely
    ]
    step = steps(len(jobs), "merges") if steps and jobs else lambda: None
    found: dict[int, MergeFound] = {}
    failures: dict[str, str] = {}
    if jobs:
        for job, result in outcomes(
            how.pool(len(jobs)), confirm_merge, jobs, workers=how.workers, given_up=merge_given_up
        ):
            name = members[job.row].name
            if not isinstance(result, Regression):
                failures[f"{name} as a merge"] = result
            elif result.relative_error**2 <= 1 - how.threshold**2 and result.is_lean():
                terms = [Term(members[t].name, w) for (t, _), w in zip(job.terms, result.weights, strict=True)]
                terms.sort(key=lambda term: (-abs(term.weight), term.name))
                found[job.row] = MergeFound(name, tuple(terms), result.relative_error)
            step()
    return [found[row] for row in sorted(found)], failures


def _path(members: Sequence[Member], index: int) -> Path:
    path = members[index].path
    assert path is not None  # what has no path has no sketch
    return path


def _related(members: Sequence[Member], pair: tuple[int, int], numbers: Shared, threshold: float) -> Related:
    a, b = (members[i] for i in pair)
    return Related(
        a.name,
        b.name,
        numbers.relation(threshold),
        numbers.cosine,
        numbers.least_cosine,
        numbers.scale,
        numbers.shared,
        numbers.only_in_a,
        numbers.only_in_b,
        a.sha256 is not None and a.sha256 == b.sha256,
        numbers.note,
    )


def _same_bytes(left_out: Sequence[Member]) -> Iterator[Related]:
    """Of adapters whose deltas are not known, those whose files are the same."""
    first: dict[str, str] = {}
    for member in left_out:
        if member.sha256 and (name := first.setdefault(member.sha256, member.name)) != member.name:
            yield Related(name, member.name, "same bytes", same_bytes=True)


def _clusters(pairs: Sequence[Related]) -> tuple[Cluster, ...]:
    names = sorted({name for pair in pairs for name in (pair.adapter, pair.other)})
    places = {name: i for i, name in enumerate(names)}
    groups = Groups(len(names))
    degrees = dict.fromkeys(names, 0)
    for pair in pairs:
        groups.join(places[pair.adapter], places[pair.other])
        degrees[pair.adapter] += 1
        degrees[pair.other] += 1
    members: dict[int, list[str]] = {}
    for i, name in enumerate(names):
        members.setdefault(groups.root(i), []).append(name)
    found = [Cluster(min(group, key=lambda n: (-degrees[n], n)), tuple(group)) for group in members.values()]
    return tuple(sorted(found, key=lambda c: (-len(c.members), c.representative)))


class Groups:
    """Which of so many things belong together."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def root(self, i: int) -> int:
        """The first thing of the group of `i`."""
        while self._parents[i] != i:
            self._parents[i] = self._parents[self._parents[i]]
            i = self._parents[i]
        return i

    def join(self, i: int, j: int) -> bool:
        """Put the groups of both together; False where they were one."""
        a, b = sorted((self.root(i), self.root(j)))
        self._parents[b] = a
        return a != b


def _report(
    hub: Path,
    how: Similar,
    count: int,
    pairs: list[Related],
    merges: list[MergeFound],
    clusters: tuple[Cluster, ...],
    left_out: Sequence[Member],
    failures: Mapping[str, str],
    warnings: Sequence[str],
) -> HubSimilarReport:
    out = [LeftOut(m.name, m.reason) for m in left_out] + [LeftOut(*each) for each in failures.items()]
    ordered = sorted(pairs, key=lambda p: (-abs(p.cosine) if p.cosine is not None else 1.0, p.adapter, p.other))
    return HubSimilarReport(
        str(hub),
        None if how.to is None else str(how.to),
        how.threshold,
        LENGTH**-0.5,
        count,
        tuple(ordered),
        tuple(merges),
        clusters,
        tuple(sorted(out, key=lambda row: row.name)),
        tuple(warnings),
    )
