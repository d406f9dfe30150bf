"""What a joining adapter stores within a budget: coefficients and components where they take most off its error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Final, NamedTuple

from loratools.budget import buy
from loratools.errors import UsageError
from loratools.hub.pack.coding import Pair, decoded, encoded
from loratools.hub.pack.layout import Numbers, PackTarget, Part, Shared
from loratools.hub.pack.members import Delta, Size
from loratools.linalg.svd import thin_svd
from loratools.operators import LowRank, sum_of
from loratools.sizes import format_size

Key = tuple[str, Size]
_RANKS: Final = 8  # of a core that are tried, at most
_NOTHING: Final = 1e-14  # of a squared norm: rounding, which no byte is spent on


class Point(NamedTuple):
    """One way to store a target: its bytes, and the squared error that it leaves."""

    bytes: int
    error: float
    part: Part


def kept_all(shared: Shared, rank: int) -> int:
    """`Part.kept` of a joining adapter of a rank: half of sparse coefficients, the rank of a core if factors pay."""
    if shared.method == "sparse":
        return max(1, shared.width // 2)
    rank = max(1, rank)
    return rank if rank <= shared.most_factors else 0


def kept_tried(shared: Shared, rank: int) -> list[int]:
    """That, and of cores also some lower ranks."""
    most = min(rank, shared.most_factors)
    lower = {-(-most * i // _RANKS) for i in range(1, _RANKS + 1)} if most else set()
    return sorted({kept_all(shared, rank), *lower})


def ways_to_store(
    delta: Delta, target: PackTarget, bases: Iterable[tuple[Part, Pair]], numbers: Numbers
) -> list[Point]:
    """The convex ways, from the one of fewest bytes: components alone, or beside the coefficients of one of `bases`."""
    whole = LowRank(delta.u * (delta.s * delta.norm), delta.vt)
    squares = (delta.s * delta.norm).square().tolist()
    points = list(_points(Part(), squares, delta.norm**2, target, numbers))
    for part, pair in bases:
        low = decoded(encoded(delta, target, part, pair, numbers, 0.0), target, part, pair, numbers)
        rest = sum_of([whole, -low])
        assert isinstance(rest, LowRank)
        left = thin_svd(rest)[1].square().tolist()
        points += _points(part, left[: min(target.shape)], delta.norm**2, target, numbers)
    return _hull(points)


def _points(part: Part, squares: list[float], whole: float, target: PackTarget, numbers: Numbers) -> Iterable[Point]:
    """With each number of components beside `part`, of which `squares` are the squared singular values."""
    left = sum(squares)
    for rank in range(len(squares) + 1):
        way = Part(part.group, rank, part.kept)
        yield Point(way.size(target.shape, target.shared, numbers), left if left > _NOTHING * whole else 0.0, way)
        left -= squares[rank] if rank < len(squares) else 0.0


def _hull(points: list[Point]) -> list[Point]:
    """Those on the lower convex hull, each of more bytes and less error than the one before."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, p.error)):
        if kept and point.error >= kept[-1].error:
            continue
        while len(kept) > 1 and _slope(*kept[-2:]) <= _slope(kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def _slope(first: Point, second: Point) -> float:
    """What a byte takes off the error between two points."""
    return (first.error - second.error) / (second.bytes - first.bytes)


def spend(
    ways: Mapping[Key, list[Point]], budget: int, size_of: Callable[[Mapping[Key, Part]], int]
) -> dict[Key, Part]:
    """The ways of least total squared error in a file of `budget` bytes at most, by `size_of`; UsageError for none."""
    least = {key: points[0].part for key, points in ways.items()}
    room = budget - size_of(least)
    if room < 0:
        bare = format_size(size_of(least))
        raise UsageError(f"a budget of {format_size(budget)} is too small: {bare} hold no more than names and norms")
    chains = [
        [(before.error - after.error, after.bytes - before.bytes) for before, after in pairwise(points)]
        for points in ways.values()
    ]
    while True:
        levels = buy(chains, room).levels
        chosen = {key: points[level].part for (key, points), level in zip(ways.items(), levels, strict=True)}
        over = size_of(chosen) - budget  # of headers, which are larger where there are more pieces
        if over <= 0:
            return chosen
        room -= over
