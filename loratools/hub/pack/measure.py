"""What every way of keeping a target would cost and gain: two passes over the adapters for some targets at a time.

The first pass finds the coordinates that the deltas of a target have in common, the second writes each delta in them
to a scratch file, which the fits read in batches. So memory is that of some targets, however many adapters there are;
what grows with these is some hundred numbers for each adapter and target.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from loratools._lazy import torch
from loratools.errors import AdapterError, naming
from loratools.hub.pack.fits import WIDEST, Candidate, candidates
from loratools.hub.pack.layout import METHODS, Numbers
from loratools.hub.pack.members import REFUSED, Delta, Member, Place, Size, delta_of, opened, unreadable
from loratools.linalg.shared_bases import RunningBasis
from loratools.pipeline import ordered_map, worker_count

if TYPE_CHECKING:
    from torch import Tensor

WIDTH: Final = 256  # common coordinates of a target's deltas on either side, at most
_STATE: Final = 192 << 20  # bytes of running bases at a time
_BATCH: Final = 4 << 20  # bytes of deltas in common coordinates, or on the widest bases, at a time
_KEPT: Final = 16 << 20  # bytes of a target's deltas up to which they stay in memory
_PADDING: Final = 1.5  # the largest rank of a batch by the smallest

_PLAIN: Final = Numbers()


@dataclass(frozen=True)
class Ways:
    """What is tried: the methods of sharing, whether with components of an adapter's own; how matrices are stored."""

    methods: frozenset[str] = frozenset(METHODS)
    private: bool = True
    numbers: Numbers = _PLAIN
    share: float = 0.2  # of the bytes, which bounds how wide bases are tried
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Measured:
    """One target: which adapters have it, norms of their deltas, shares of the squared norm of each component."""

    name: str
    shape: Size
    members: Tensor  # (t,) int64
    norms: Tensor  # (t,)
    spectra: Tensor  # (t, r): squares that add up to 1
    candidates: tuple[Candidate, ...] = ()


class UnusableError(Exception):
    """An adapter that turned out to be of no use."""

    def __init__(self, member: int, reason: str) -> None:
        super().__init__(reason)
        self.member, self.reason = member, reason


@dataclass(eq=False)
class _Target:
    """One target while it is measured."""

    name: str
    shape: Size
    places: dict[int, Place] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)
    order: dict[int, int] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    spectra: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    sides: tuple[RunningBasis, RunningBasis] | None = None
    coordinates: tuple[Tensor, Tensor] | None = None
    scratch: BinaryIO | None = None

    @property
    def state(self) -> int:
        return 32 * sum(side * min(side, WIDTH) for side in self.shape)

    def begin(self) -> None:
        """Order the adapters by rank, so that batches of them hold little padding."""
        self.places = dict(sorted(self.places.items(), key=lambda item: (item[1].rank, item[0])))
        self.ranks = [min(place.rank, *self.shape) for place in self.places.values()]
        self.order = {member: at for at, member in enumerate(self.places)}
        self.norms = [0.0] * len(self.ranks)
        self.spectra = torch.zeros(len(self.ranks), self.ranks[-1], dtype=torch.float64)
        self.sides = RunningBasis(self.shape[0], WIDTH), RunningBasis(self.shape[1], WIDTH)

    def see(self, member: int, delta: Delta) -> None:
        assert self.sides is not None
        at = self.order[member]
        self.norms[at] = delta.norm
        self.spectra[at, : len(delta.s)] = delta.s.square()
        if len(self.places) > 1:
            self.sides[0].append(delta.u * delta.s.sqrt())
            self.sides[1].append(delta.vt.T * delta.s.sqrt())

    def turn(self, folder: Path) -> None:
        """From finding coordinates to using them."""
        assert self.sides is not None
        if len(self.places) > 1:
            self.coordinates = self.sides[0].vectors(), self.sides[1].vectors()
            self.scratch = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- closed once the target is measured
            self.starts = [0, *accumulate(8 * self._width * rank for rank in self.ranks)]
        self.sides = None

    def put(self, member: int, delta: Delta) -> None:
        if self.scratch is None or self.coordinates is None:
            return
        at, root = self.order[member], delta.s.sqrt()
        x = self.coordinates[0].T @ (delta.u * root)
        y = self.coordinates[1].T @ (delta.vt.T * root)
        both = torch.nn.functional.pad(torch.cat([x, y]), (0, self.ranks[at] - len(root)))
        self.scratch.seek(self.starts[at])
        self.scratch.write(both.numpy().tobytes())

    @property
    def _width(self) -> int:
        assert self.coordinates is not None
        return sum(side.shape[1] for side in self.coordinates)

    def nbytes(self) -> int:
        """Of all deltas in common coordinates."""
        return self.starts[-1]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right factors (b, p, r) and (b, q, r) of some adapters of like rank at a time."""
        assert self.scratch is not None
        assert self.coordinates is not None
        p, width, at = self.coordinates[0].shape[1], self._width, 0
        self.scratch.flush()
        while at < len(self.ranks):
            # a batch times the widest bases has to fit too
            end, most = at + 1, _PADDING * self.ranks[at]
            while end < len(self.ranks) and self.ranks[end] <= most:
                if (end - at + 1) * 8 * width * max(self.ranks[end], WIDEST) > _BATCH:
                    break
                end += 1
            yield (both := self._read(at, end, width))[:, :p], both[:, p:]
            at = end

    def _read(self, at: int, end: int, width: int) -> Tensor:
        """(end - at, width, the largest rank)."""
        assert self.scratch is not None
        data = torch.empty((self.starts[end] - self.starts[at]) // 8, dtype=torch.float64)
        self.scratch.seek(self.starts[at])
        if self.scratch.readinto(data.numpy().data.cast("B")) != 8 * len(data):  # type: ignore[attr-defined]
            raise AdapterError("the scratch file became shorter while it was read; free some space")
        ranks = self.ranks[at:end]
        if ranks[0] == ranks[-1]:
            return data.reshape(end - at, width, ranks[0])
        both, start = data.new_zeros(end - at, width, ranks[-1]), 0
        for row, rank in zip(both, ranks, strict=True):
            row[:, :rank] = data[start : start + width * rank].reshape(width, rank)
            start += width * rank
        return both


def measured(
    members: Sequence[Member], ways: Ways, scratch: Path, *, step: Callable[[], None] = lambda: None
) -> Iterator[Measured]:
    """Every target that some adapter has factors of; bases that were fitted lie in `scratch`, encoded.

    Raises UnusableError for an adapter whose tensors turn out to be of no use. `step` is called after each target.
    """
    for chunk in _chunks(_targets(members)):
        for target in chunk:
            target.begin()
        for target, member, delta in _deltas(members, chunk):
            target.see(member, delta)
        for target in chunk:
            target.turn(scratch)
        for target, member, delta in _deltas(members, [t for t in chunk if t.coordinates is not None]):
            target.put(member, delta)
        work = partial(_measured, ways=ways, scratch=scratch)
        for found in ordered_map(work, chunk, workers=worker_count("cpu")):
            yield found
            step()


def target_count(members: Sequence[Member]) -> int:
    """How many targets `measured` yields."""
    return len({key for member in members for key in member.places})


def _targets(members: Sequence[Member]) -> list[_Target]:
    found: dict[tuple[str, Size], _Target] = {}
    for i, member in enumerate(members):
        for key, place in member.places.items():
            found.setdefault(key, _Target(*key)).places[i] = place
    return list(found.values())


def _chunks(targets: Sequence[_Target]) -> Iterator[list[_Target]]:
    chunk: list[_Target] = []
    for target in targets:
        if chunk and sum(t.state for t in chunk) + target.state > _STATE:
            yield chunk
            chunk = []
        chunk.append(target)
    if chunk:
        yield chunk


def _deltas(members: Sequence[Member], targets: Sequence[_Target]) -> Iterator[tuple[_Target, int, Delta]]:
    """One adapter after the other, each opened once."""
    for i, member in enumerate(members):
        wanted = [t for t in targets if i in t.places]
        if not wanted:
            continue
        try:
            with opened(member.path) as (adapter, _, _):
                for target in wanted:
                    own = target.places[i].target
                    with naming(own):
                        delta = delta_of(adapter[own])
                    yield target, i, delta
        except REFUSED as error:
            raise UnusableError(i, unreadable(error)) from error


def _measured(target: _Target, ways: Ways, scratch: Path) -> Measured:
    members = torch.tensor(list(target.places))
    norms = torch.tensor(target.norms, dtype=torch.float64)
    found: tuple[Candidate, ...] = ()
    if target.coordinates is not None and bool((norms > 0).any()):
        kept = list(target.batches()) if target.nbytes() <= _KEPT else None
        batches = target.batches if kept is None else lambda: iter(kept)
        found = tuple(
            candidates(
                batches,
                target.spectra,
                target.coordinates,
                methods=ways.methods,
                numbers=ways.numbers,
                limit=2 * ways.share * _plain_bytes(target, ways.numbers),
                private=ways.private,
                seed=ways.seed,
                folder=scratch,
            )
        )
    if target.scratch is not None:
        target.scratch.close()
    target.coordinates = target.scratch = None
    return Measured(target.name, target.shape, members, norms, target.spectra, found)


def _plain_bytes(target: _Target, numbers: Numbers) -> int:
    """Bytes that all factors of the target take in the dtype of the pack."""
    ranks = sum(place.rank for place in target.places.values())
    return ranks * sum(numbers.plain().size(1, side) for side in target.shape)
