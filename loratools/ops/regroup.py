"""Which targets of a file make which targets of another: copied, taken apart by rows, or joined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratools.adapter import entry_of
from loratools.errors import AdapterError
from loratools.families import Update
from loratools.families.regroup import join, take
from loratools.formats.modules import Module, Placement, Rows


@dataclass(frozen=True)
class Source:
    """Rows of one target of the input, and the rows of the output that they become."""

    target: str
    rows: Rows
    into: Rows
    part: tuple[int, int]  # which of how many parts of the input's target


@dataclass(frozen=True)
class Job:
    """One target to be written."""

    target: str
    rule: str
    pieces: tuple[Source, ...]
    missing: int  # parts of a fused module that nothing changes
    is_copy: bool

    @property
    def sources(self) -> tuple[str, ...]:
        """Targets of the input, each once."""
        return tuple(dict.fromkeys(piece.target for piece in self.pieces))


def jobs_for(placements: Mapping[str, Placement], modules: Mapping[Module, tuple[str, Rows]]) -> list[Job]:
    """One job for each target to be written."""
    count = Counter(target for target, _ in modules.values())
    seen: Counter[str] = Counter()
    position: dict[Module, int] = {}
    for module, (target, _) in modules.items():
        position[module] = seen[target]
        seen[target] += 1
    jobs = []
    for target, placement in placements.items():
        pieces = []
        for piece in placement.pieces:
            if piece.module in modules:
                name, rows = modules[piece.module]
                pieces.append(Source(name, rows, piece.rows, (position[piece.module], count[name])))
        missing = len(placement.pieces) - len(pieces)
        same = all(p.rows == p.into for p in pieces) and len({p.target for p in pieces}) == 1
        is_copy = same and not missing and count[pieces[0].target] == len(pieces)
        jobs.append(Job(target, placement.rule, tuple(pieces), missing, is_copy))
    return jobs


def made(job: Job, updates: Mapping[str, Update]) -> tuple[Update, tuple[str, ...]]:
    """The update of a job from those of its sources, with what was done; AdapterError where rows do not come apart."""
    if job.is_copy:
        return updates[job.sources[0]], ()
    parts = []
    for piece in job.pieces:
        update = updates[piece.target]
        try:
            rows = piece.rows.indices(_outputs(update))
        except ValueError as error:
            raise AdapterError(f"{piece.target}: {error}") from error
        parts.append(update if piece.rows.is_whole else take(update, rows, part=piece.part))
    if len(parts) == 1 and job.pieces[0].into.is_whole:
        return parts[0], (f"rows of {job.pieces[0].target}",)
    first = job.pieces[0].into
    unit = _outputs(parts[0]) // first.count
    total = unit * first.units
    joined = join([(u, piece.into.indices(total)) for u, piece in zip(parts, job.pieces, strict=True)], total)
    return joined, (_how(parts, joined, job),)


def _outputs(update: Update) -> int:
    return int(update.parameters()["up"].shape[0])


def _how(parts: Sequence[Update], joined: Update, job: Job) -> str:
    ranks = [entry_of(u).rank for u in parts]
    shared = {entry_of(joined).rank} == set(ranks)
    how = "which share their down factor" if shared else "side by side"
    zeros = f", {job.missing} parts zero" if job.missing else ""
    return f"{len(parts)} parts joined {how}{zeros}"
