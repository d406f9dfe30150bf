"""A hub into a pack, and a further adapter into a pack: what is written is measured as it will be read."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratools._lazy import torch
from loratools.errors import AdapterError, InputError, OutputError, UsageError, naming
from loratools.hub.discover import Refused, discover
from loratools.hub.pack.coding import Pair, decoded, encoded, pair_of
from loratools.hub.pack.layout import METHODS, NORM, Numbers, PackTarget, Part, piece_sizes, share_of
from loratools.hub.pack.measure import UnusableError, Ways, measured, target_count
from loratools.hub.pack.members import (
    REFUSED,
    Member,
    Size,
    delta_of,
    fitted,
    header_of,
    member_of,
    opened,
    unreadable,
)
from loratools.hub.pack.plan import AUTO, CHOICES, OWN, Plan, Planned, plan
from loratools.hub.pack.reader import INDEX, Index, Listing, read_index
from loratools.linalg.inner import frobenius
from loratools.operators import sum_of
from loratools.reports.pack import PackedAdapter, PackedTarget, PackReport
from loratools.sizes import parse_size
from loratools.storage.atomic import printable, refuse_existing, write_whole
from loratools.storage.base import TensorSpec
from loratools.storage.folder import AtomicFolder
from loratools.storage.header import file_size, header_bytes
from loratools.storage.safetensors import SafetensorsSink

if TYPE_CHECKING:
    from torch import Tensor

Steps = Callable[[int, str], Callable[[], None]]
_MARK: Final = {"loratools.pack": "1"}


@dataclass(frozen=True)
class Packing:
    """How to pack.

    `budget`: bytes of all files, such as 12MB, or a share of those of the adapters, such as 20%. `method`: one way for
    everything, or `auto`. `bits` of bases, cores and components: 8, 4, or 0 for the dtype of most adapters.
    """

    budget: str = "20%"
    method: str = AUTO
    bits: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in CHOICES:
            raise UsageError(f"no method {self.method!r}; choose one of {', '.join(CHOICES)}")
        if self.bits not in (0, 4, 8):
            raise UsageError(f"{self.bits} bits: choose 8, 4 or none")

    def bytes(self, before: int) -> int:
        """The budget in bytes, of a hub that has so many; UsageError for what is no size."""
        text = self.budget.strip()
        if not text.endswith("%"):
            return parse_size(text)
        try:
            share = float(text[:-1])
        except ValueError:
            share = math.nan
        if not 0 < share <= 1000:
            raise UsageError(f"{self.budget!r} is no share; write for example 20%")
        return int(before * share / 100)


def pack(
    hub: Path,
    out: Path,
    how: Packing = Packing(),
    *,
    force: bool = False,
    steps: Steps = lambda total, what: lambda: None,
) -> PackReport:
    """Pack every adapter of `hub` into the folder `out`, which appears whole; what cannot be packed is a row.

    Raises InputError for a hub that cannot be read or has no adapter that can be packed, UsageError for a budget that
    is too small, OutputError where `out` exists and `force` is not given.
    """
    refuse_existing(out, force=force)
    _refuse_what_is_no_pack(out)
    if hub.resolve() == out.resolve():
        raise UsageError(f"{printable(out)}: is the hub itself; write elsewhere")
    members, failed = _members(hub, out)
    with AtomicFolder(out, carry=False) as folder:
        while True:
            if not members:
                first = f": {failed[0].name}: {failed[0].reason}" if failed else ""
                raise InputError(f"{printable(hub)}: no adapter in it can be packed{first}")
            scratch = Path(tempfile.mkdtemp(prefix="scratch.", dir=folder.temporary))
            try:
                report = _written(folder.temporary, scratch, members, how, steps)
                break
            except UnusableError as bad:
                failed.append(PackedAdapter(members[bad.member].name, "failed", bad.reason))
                del members[bad.member]
                for left in ("adapters", "bases"):
                    shutil.rmtree(folder.temporary / left, ignore_errors=True)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        size = sum(p.stat().st_size for p in folder.temporary.rglob("*") if p.is_file())
        folder.commit()
    rows = tuple(sorted([*report.adapters, *failed], key=lambda row: row.name))
    return replace(report, output=str(out), bytes_after=size, adapters=rows)


def _written(folder: Path, scratch: Path, members: Sequence[Member], how: Packing, steps: Steps) -> PackReport:
    """Measure, decide, write all files. Raises UnusableError for an adapter that turns out to be of no use."""
    before = sum(m.nbytes for m in members)
    budget = how.bytes(before)
    numbers, bases = _numbers(members, how.bits)
    methods = frozenset(METHODS) if how.method == AUTO else frozenset({how.method} - {OWN})
    ways = Ways(methods, how.method == AUTO, bases, min(1.0, budget / before), how.seed)
    targets = list(measured(members, ways, scratch, step=steps(target_count(members), "targets measured")))

    def size_of(p: Plan) -> int:
        return _size(p, members, numbers, bases)

    chosen, expected = plan(targets, numbers, bases, budget, size_of, method=how.method)
    _write_bases(folder, chosen, bases)
    rows = _write_members(folder, chosen, members, numbers, bases, steps)
    index = _index(chosen, members, bases, [row.relative_error or 0.0 for row in rows])
    write_whole(folder / INDEX, index.to_text().encode("utf-8"))
    shown = tuple(_target_row(t, numbers) for t in chosen.targets)
    return PackReport("", how.method, budget, before, 0, tuple(rows), shown, expected)


def _refuse_what_is_no_pack(out: Path) -> None:
    """OutputError where replacing `out` would lose something else than a pack."""
    if out.is_dir() and any(out.iterdir()):
        try:
            read_index(out)
        except InputError:
            raise OutputError(f"{printable(out)}: is a folder with other files in it; choose another output") from None
    elif out.exists() and not out.is_dir():
        raise OutputError(f"{printable(out)}: is a file; a pack is a folder")


def _members(hub: Path, out: Path) -> tuple[list[Member], list[PackedAdapter]]:
    members: list[Member] = []
    names: set[str] = set()
    failed = []
    for found in discover(hub, without=out):
        if isinstance(found, Refused):
            failed.append(PackedAdapter(found.name, "failed", found.reason))
            continue
        try:
            member = member_of(found.stem, found.path)
            if member.name in names:
                raise AdapterError("another adapter of the hub has its name; rename one")
            names.add(member.name)
            members.append(member)
        except REFUSED as error:
            failed.append(PackedAdapter(found.stem, "failed", unreadable(error)))
    return members, failed


def _numbers(members: Sequence[Member], bits: int) -> tuple[list[Numbers], Numbers]:
    """How each adapter's own matrices are stored, and how bases are: in the dtype that most adapters have."""
    counts: dict[str, int] = {}
    for member in members:
        counts[member.dtype] = counts.get(member.dtype, 0) + 1
    usual = max(sorted(counts), key=lambda name: counts[name])
    return [Numbers(m.dtype, bits) for m in members], Numbers(usual, bits)


def _parts(chosen: Plan, count: int) -> list[dict[tuple[str, Size], Part]]:
    """What each adapter has of each target."""
    found: list[dict[tuple[str, Size], Part]] = [{} for _ in range(count)]
    for planned in chosen.targets:
        key = (planned.target.name, planned.target.shape)
        for i, *row in zip(planned.measured.members.tolist(), planned.group.tolist(), planned.rank.tolist(),
                           planned.kept.tolist(), strict=True):  # fmt: skip
            group, rank, kept = row
            found[i][key] = Part(group, int(rank), kept if group >= 0 else 0)
    return found


def _size(chosen: Plan, members: Sequence[Member], numbers: Sequence[Numbers], bases: Numbers) -> int:
    """Bytes of all files of the pack, to the byte."""
    total = len(_index(chosen, members, bases, [0.0] * len(members)).to_text().encode("utf-8"))
    for specs in _base_specs(chosen, bases).values():
        total += file_size(specs, _MARK)
    shared = {(p.target.name, p.target.shape): p.target.shared for p in chosen.targets}
    for member, parts, own in zip(members, _parts(chosen, len(members)), numbers, strict=True):
        sizes = [parts[key].size(key[1], shared[key], own) for key in member.places]
        total += member_size(member, sizes)
    return total


def member_size(member: Member, sizes: Sequence[int]) -> int:
    """Bytes of an adapter's file whose targets take these."""
    return file_size(_member_specs(member.header_size, sizes, member.kept), _MARK)


def _base_specs(chosen: Plan, bases: Numbers) -> dict[str, dict[str, TensorSpec]]:
    """File -> name -> spec."""
    files: dict[str, dict[str, TensorSpec]] = {}
    for i, planned in enumerate(chosen.targets):
        shared, shape = planned.target.shared, planned.target.shape
        if shared is not None:
            size = shared.base_size(shape, bases)
            files.setdefault(share_of(shape), {}).update(
                {f"{i}.{g}": TensorSpec("U8", (size,)) for g in range(shared.groups)}
            )
    return files


def _member_specs(header: int, sizes: Sequence[int], kept: Sequence[tuple[str, int]]) -> dict[str, TensorSpec]:
    pieces = piece_sizes([*sizes, *(size for _, size in kept)])
    return {
        "header": TensorSpec("U8", (header,)),
        "layout": TensorSpec("I16", (len(sizes), 3)),
        **{f"data.{i}": TensorSpec("U8", (size,)) for i, size in enumerate(pieces)},
    }


def _index(chosen: Plan, members: Sequence[Member], bases: Numbers, errors: Sequence[float]) -> Index:
    adapters = tuple(
        Listing(m.name, f"adapters/{i:05}.safetensors", error, m.nbytes)
        for i, (m, error) in enumerate(zip(members, errors, strict=True))
    )
    return Index(chosen.method, bases, tuple(p.target for p in chosen.targets), adapters)


def _write_bases(folder: Path, chosen: Plan, bases: Numbers) -> None:
    for file, specs in _base_specs(chosen, bases).items():
        with SafetensorsSink(folder / file, reserve=len(header_bytes(specs, _MARK))) as sink:
            for name, spec in specs.items():
                index, group = (int(n) for n in name.split("."))
                candidate = chosen.targets[index].candidate
                assert candidate is not None
                with candidate.file.open("rb") as stored:
                    stored.seek(group * spec.nbytes)
                    sink.write(name, torch.frombuffer(bytearray(stored.read(spec.nbytes)), dtype=torch.uint8))
            sink.commit(_MARK)


def _write_members(
    folder: Path, chosen: Plan, members: Sequence[Member], numbers: Sequence[Numbers], bases: Numbers, steps: Steps
) -> list[PackedAdapter]:
    where = {(p.target.name, p.target.shape): p for p in chosen.targets}
    step = steps(len(members), "adapters written")
    rows = []
    for i, (member, parts) in enumerate(zip(members, _parts(chosen, len(members)), strict=True)):

        def pair(key: tuple[str, Size], group: int) -> Pair:
            return _pair(where[key], group, bases)

        jobs = {
            key: Job(where[key].target, parts[key], getattr(where[key].candidate, "penalty", 0.0))
            for key in member.places
        }
        try:
            rows.append(write_member(folder / f"adapters/{i:05}.safetensors", member, jobs, pair, numbers[i]))
        except REFUSED as error:
            raise UnusableError(i, unreadable(error)) from error
        step()
    return rows


def _pair(planned: Planned, group: int, bases: Numbers) -> Pair:
    assert planned.candidate is not None
    shared = planned.candidate.shared
    size = shared.base_size(planned.target.shape, bases)
    with planned.candidate.file.open("rb") as stored:
        stored.seek(group * size)
        data = torch.frombuffer(bytearray(stored.read(size)), dtype=torch.uint8)
    return pair_of(data, shared, planned.target.shape, bases)


@dataclass(frozen=True)
class Job:
    """What is to be written of one target of an adapter."""

    target: PackTarget
    part: Part
    penalty: float = 0.0


def write_member(
    place: Path,
    member: Member,
    jobs: dict[tuple[str, Size], Job],
    pair: Callable[[tuple[str, Size], int], Pair],
    numbers: Numbers,
) -> PackedAdapter:
    """Write an adapter's file, one piece in memory at a time; its row tells the error as it will be read."""
    sizes = [jobs[key].part.size(key[1], jobs[key].target.shared, numbers) for key in member.places]
    squares = []
    with opened(member.path) as (adapter, source, config):
        specs = _member_specs(member.header_size, sizes, member.kept)
        header = header_of(member.name, adapter, source, config, member.places)

        def contents() -> Iterator[Tensor]:
            for key, place_ in member.places.items():
                job, before = jobs[key], adapter.entries[place_.target]
                with naming(place_.target):
                    update = adapter[place_.target]
                    delta = delta_of(update)
                    bases = pair(key, job.part.group) if job.part.group >= 0 else None
                    data = encoded(delta, job.target, job.part, bases, numbers, job.penalty)
                    low = decoded(data, job.target, job.part, bases, numbers)
                    scale = adapter.format.writable_scale(place_.target, low.rank, before.scale, "fold")
                    after = fitted(before, low, low.rank, scale)
                    off = sum_of([update.operator().to(torch.float64), -after.operator().to(torch.float64)])
                    squares.append((delta.norm**2, frobenius(off) ** 2))
                yield data
            for key_, _ in member.kept:
                yield source.read(key_).contiguous().reshape(-1).view(torch.uint8)

        with SafetensorsSink(place, reserve=len(header_bytes(specs, _MARK))) as sink:
            sink.write("header", torch.frombuffer(bytearray(header), dtype=torch.uint8))
            rows = [(jobs[key].part.group, jobs[key].part.rank, jobs[key].part.kept) for key in member.places]
            sink.write("layout", torch.tensor(rows, dtype=torch.int16).reshape(-1, 3))
            _write_pieces(sink, contents(), [*sizes, *(size for _, size in member.kept)])
            nbytes = sink.commit(_MARK)
    norm, distance = (math.fsum(column) for column in zip(*squares, strict=True)) if squares else (0.0, 0.0)
    error = math.sqrt(distance / norm) if norm else 0.0
    used = sum(job.part.group >= 0 for job in jobs.values())
    return PackedAdapter(
        member.name,
        "done",
        "",
        member.nbytes,
        nbytes,
        error,
        len(jobs),
        used,
        len(member.reasons),
        next((f"{t}: {why}" for t, why in member.reasons.items()), ""),
    )


def _write_pieces(sink: SafetensorsSink, contents: Iterator[Tensor], sizes: Sequence[int]) -> None:
    ends = piece_sizes(sizes)
    waiting: list[Tensor] = []
    at = piece = 0
    for data in contents:
        waiting.append(data)
        at += data.numel()
        if piece < len(ends) and at >= ends[piece]:
            sink.write(f"data.{piece}", torch.cat(waiting))
            waiting, at, piece = [], 0, piece + 1
    if piece < len(ends):
        sink.write(f"data.{piece}", torch.cat(waiting) if waiting else torch.empty(0, dtype=torch.uint8))


def _target_row(planned: Planned, numbers: Sequence[Numbers]) -> PackedTarget:
    target, members = planned.target, planned.measured.members.tolist()
    inside = planned.group >= 0
    own = sum(
        NORM + Part(-1, int(rank)).rank_size(target.shape, numbers[i])
        for i, rank in zip(members, planned.rank.tolist(), strict=True)
    )
    method = OWN if target.shared is None else target.shared.method
    return PackedTarget(
        target.name,
        target.shape,
        method,
        target.shared.width if target.shared else 0,
        target.shared.groups if target.shared else 0,
        len(members),
        int(inside.sum()),
        int(planned.rank.sum()),
        planned.candidate.base_bytes if planned.candidate else 0,
        own,
    )
