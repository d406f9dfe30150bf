"""A further adapter into a pack, whose bases stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from loratools.errors import OutputError, UsageError, naming
from loratools.hub.pack.coding import Pair, decoded, encoded
from loratools.hub.pack.layout import Numbers, PackTarget, Part
from loratools.hub.pack.members import Delta, Member, Size, delta_of, member_of, opened
from loratools.hub.pack.reader import INDEX, Index, Listing, Pack
from loratools.hub.pack.spend import kept_all, kept_tried, spend, ways_to_store
from loratools.hub.pack.writer import Job, Packing, member_size, write_member
from loratools.linalg.inner import frobenius
from loratools.operators import LowRank, sum_of
from loratools.reports.pack import PackAddReport
from loratools.storage.atomic import printable, write_whole
from loratools.storage.header import quoted


def add(
    path: Path, adapter: Path, *, name: str | None = None, budget: str | None = None, force: bool = False
) -> PackAddReport:
    """Let an adapter join the pack at `path` without a new fit; `name` is its file's or folder's by default.

    Of each target it gets coefficients on the bases that there are, by least squares; or as many components of its own
    as take no more bytes than these, one at least, where that errs less. Targets that the pack does not know get what
    the pack's adapters have of theirs on average. With a `budget`, bytes such as 1MB or a share of the adapter's
    such as 20%, its file has at most so many, and coefficients and components go where they take most off its error.
    The file appears whole, then the index that names it. Raises OutputError where the pack has the name and `force` is
    not given, UsageError for a name that is no path within a hub, and for a budget that is too small.
    """
    if name is not None and not _is_within(name):
        raise UsageError(f"--name {quoted(name)}: give a name as a hub would, such as law/contracts")
    with Pack(path) as pack:
        called = name or (adapter.resolve().name if adapter.is_dir() else adapter.stem)
        if called in pack and not force:
            raise OutputError(f"{printable(path)}: holds {quoted(called)} already; give another --name or pass --force")
        before = _nbytes(path)
        member = member_of(called, adapter)
        numbers = Numbers(member.dtype, pack.index.numbers.bits)
        targets, where = _extended(pack.index, member)
        if budget is None:
            jobs = _jobs(pack, member, numbers, targets, where, _usual_bytes(pack))
            most = None
        else:
            most = Packing(budget).bytes(member.nbytes)
            jobs = _spent(pack, member, numbers, targets, where, most)
        file = f"adapters/{_next_number(pack.index):05}.safetensors"

        def pair(key: tuple[str, Size], group: int) -> Pair:
            return pack.pair(where[key], group)

        row = write_member(path / file, member, jobs, pair, numbers)
        listing = Listing(called, file, row.relative_error or 0.0, member.nbytes)
        kept = tuple(a for a in pack.index.adapters if a.name != called)
        index = replace(pack.index, targets=targets, adapters=(*kept, listing))
        try:
            write_whole(path / INDEX, index.to_text().encode("utf-8"))
        except BaseException:
            (path / file).unlink(missing_ok=True)
            raise
        for old in (a for a in pack.index.adapters if a.name == called):
            (path / old.file).unlink(missing_ok=True)
        components = sum(job.part.rank for job in jobs.values())
        return PackAddReport(str(path), row, before, _nbytes(path), components, most)


def _nbytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _next_number(index: Index) -> int:
    numbers = [int(stem) for a in index.adapters if (stem := Path(a.file).stem).isdecimal()]
    return max(numbers, default=-1) + 1


def _extended(index: Index, member: Member) -> tuple[tuple[PackTarget, ...], dict[tuple[str, Size], int]]:
    """The targets of the pack with those that are new, and where each is."""
    known = [(t.name, t.shape) for t in index.targets]
    new = [key for key in member.places if key not in set(known)]
    where = {key: i for i, key in enumerate([*known, *new])}
    return (*index.targets, *(PackTarget(*key) for key in new)), where


def _usual_bytes(pack: Pack) -> float:
    """Bytes of a number of a delta, of the adapters that are in the pack, for targets that no base serves."""
    spent = numbers = 0.0
    for name in list(pack)[:16]:
        for record, part, size in pack.parts(name):
            if record.shared is None:
                spent, numbers = spent + size, numbers + sum(record.shape)
    return spent / numbers if numbers else 0.0


def _jobs(
    pack: Pack,
    member: Member,
    numbers: Numbers,
    targets: tuple[PackTarget, ...],
    where: Mapping[tuple[str, Size], int],
    usual: float,
) -> dict[tuple[str, Size], Job]:
    jobs = {}
    with opened(member.path) as (adapter, _, _):
        for key, place in member.places.items():
            target = targets[where[key]]
            with naming(place.target):
                delta = delta_of(adapter[place.target])
            most = min(len(delta.s), *target.shape)
            if target.shared is None:
                room = usual * sum(target.shape)
                jobs[key] = Job(target, _own(target, numbers, room, most))
                continue
            kept = kept_all(target.shared, most)
            options = [Part(group, 0, kept) for group in range(target.shared.groups)]
            room = options[0].size(target.shape, target.shared, numbers)
            options.append(_own(target, numbers, room, most))
            errors = [_error(delta, target, part, pack, where[key], numbers) for part in options]
            jobs[key] = Job(target, options[errors.index(min(errors))])
    return jobs


def _spent(
    pack: Pack,
    member: Member,
    numbers: Numbers,
    targets: tuple[PackTarget, ...],
    where: Mapping[tuple[str, Size], int],
    budget: int,
) -> dict[tuple[str, Size], Job]:
    ways = {}
    with opened(member.path) as (adapter, _, _):
        for key, place in member.places.items():
            target, index = targets[where[key]], where[key]
            with naming(place.target):
                delta = delta_of(adapter[place.target])
            shared, rank = target.shared, len(delta.s)
            parts = () if shared is None else product(range(shared.groups), kept_tried(shared, rank))
            bases = ((Part(group, 0, kept), pack.pair(index, group)) for group, kept in parts)
            ways[key] = ways_to_store(delta, target, bases, numbers)

    def size_of(parts: Mapping[tuple[str, Size], Part]) -> int:
        return member_size(member, [parts[k].size(k[1], targets[where[k]].shared, numbers) for k in member.places])

    return {key: Job(targets[where[key]], part) for key, part in spend(ways, budget, size_of).items()}


def _is_within(name: str) -> bool:
    """Whether an adapter of a hub could be called so: who unpacks by name must not be led out of a folder."""
    return name.isprintable() and not {"", ".", ".."} & set(name.split("/"))


def _own(target: PackTarget, numbers: Numbers, room: float, most: int) -> Part:
    """As many components as take no more than `room`, one at least, if there is any."""
    rank = min(1, most)
    while rank < most and Part(-1, rank + 1).size(target.shape, None, numbers) <= room:
        rank += 1
    return Part(-1, rank)


def _error(delta: Delta, target: PackTarget, part: Part, pack: Pack, index: int, numbers: Numbers) -> float:
    pair = pack.pair(index, part.group) if part.group >= 0 else None
    low = decoded(encoded(delta, target, part, pair, numbers, 0.0), target, part, pair, numbers)
    return frobenius(sum_of([LowRank(delta.u * (delta.s * delta.norm), delta.vt), -low]))
