"""How often each adapter is asked for: from a log, or by an assumption that is stated."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loratools.errors import InputError, UsageError
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LINES = 1 << 18  # of a log, at a time
_EXAMPLES = 5
_MOST_COUNT = 1e15  # whose sums are exact to a request, or nearly so


@dataclass(frozen=True, eq=False)
class Popularity:
    """Requests for each adapter, or shares of them; `trace` is the order in which a log has them, where it has one.

    `stated` says in words where it comes from. `unknown` requests were for names that the hub does not have.
    """

    weights: NDArray[np.float64]
    stated: str
    trace: NDArray[np.int64] | None = None
    unknown: float = 0.0
    unknown_names: tuple[str, ...] = ()


def zipf(count: int, exponent: float, seed: int) -> Popularity:
    """The k-th most popular is asked for in proportion to 1 / k ** exponent; which one that is, is drawn."""
    if not (np.isfinite(exponent) and exponent >= 0):
        raise UsageError(f"--zipf {exponent:g}: give 0, for all alike, or a number above")
    if seed < 0:
        raise UsageError(f"--seed {seed}: give 0 or more")
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    if exponent == 0:
        return Popularity(weights, "assumed: all alike")
    order = np.random.default_rng([seed, 0]).permutation(count)
    spread = np.empty(count)
    spread[order] = weights
    return Popularity(spread, f"assumed: Zipf, exponent {exponent:g}, over a random order (seed {seed})")


def read_log(path: Path, names: Any) -> Popularity:
    """From lines of name,count, or of a name for each request in their order; a header `name` is passed over.

    `names` are those of the adapters: a list, or an array of pyarrow. Raises InputError for a line that is neither, by
    its number, and for a log without any request.
    """
    weights = np.zeros(len(names))
    places = Places(names)
    found: list[NDArray[np.int64]] = []
    unknown, strangers, counted = 0.0, dict[str, None](), None
    for asked, counts in _lines(path):
        here = places.of(asked)
        known = here >= 0
        if counts is None:
            found.append(here[known].astype(np.int32 if len(names) < 2**31 else np.int64))
            weights += np.bincount(here[known], minlength=len(names))
            unknown += float((~known).sum())
        else:
            weights += np.bincount(here[known], weights=counts[known], minlength=len(names))
            unknown += float(counts[~known].sum())
        counted = counts is not None
        for i in np.flatnonzero(~known)[: _EXAMPLES * _EXAMPLES]:
            if len(strangers) < _EXAMPLES:
                strangers[asked[i]] = None
    total = weights.sum() + unknown
    if total <= 0:
        raise InputError(f"{printable(path)}: holds no requests; write name,count or a name on each line")
    stated = f"from {printable(path)}: {total:.0f} requests"
    trace = None if counted else np.concatenate(found)
    return Popularity(weights, stated, trace, unknown, tuple(strangers))


def drawn(popularity: NDArray[np.float64], requests: int, seed: int) -> NDArray[np.int64]:
    """A trace of independent requests, the same for the same seed."""
    if requests < 1:
        raise UsageError(f"--requests {requests}: give at least 1")
    cumulative = np.cumsum(popularity)
    points = np.random.default_rng([seed, 1]).random(requests) * cumulative[-1]
    # The last with any popularity, should rounding put a point at the very end.
    return np.minimum(np.searchsorted(cumulative, points, side="right"), np.flatnonzero(popularity)[-1])


class Places:
    """Where each name stands in an array of names."""

    def __init__(self, names: Any) -> None:
        self._names = names
        self._index = {name: i for i, name in enumerate(names)} if isinstance(names, list) else None

    def of(self, asked: Sequence[str]) -> NDArray[np.int64]:
        """The first place of each name, -1 for one that is not there."""
        if self._index is not None:
            return np.fromiter((self._index.get(name, -1) for name in asked), np.int64, len(asked))
        import pyarrow as pa
        from pyarrow import compute

        texts = pa.array([a if a.isascii() else _encodable(a) for a in asked], self._names.type)
        where = compute.index_in(texts, value_set=self._names)
        return np.asarray(where.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def _lines(path: Path) -> Iterator[tuple[list[str], NDArray[np.float64] | None]]:
    """Names and counts, many lines at a time; counts are None in a log of requests."""
    names: list[str] = []
    counts: list[float] = []
    width = 0
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = csv.reader(file, strict=True)
            for row in lines:
                if not row:
                    continue
                number = lines.line_num
                if not width and row[0].strip().lower() in _HEADER and (len(row) == 1 or not _is_number(row[1])):
                    width = len(row)
                    continue
                width = width or len(row)
                if len(row) != width or width > 2 or not row[0]:
                    raise _malformed(path, number, width)
                names.append(row[0])
                if width == 2:
                    counts.append(_count(row[1], path, number))
                if len(names) == _LINES:
                    yield names, np.array(counts) if width == 2 else None
                    names, counts = [], []
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise InputError(f"{printable(path)}: line {lines.line_num}: {error}") from error
    yield names, np.array(counts) if width == 2 else None


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


_HEADER = ("name", "adapter")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _count(text: str, path: Path, number: int) -> float:
    value = float(text) if _is_number(text) else -1.0
    if not 0 <= value <= _MOST_COUNT:
        wanted = f"give a number from 0 to {_MOST_COUNT:g}"
        raise InputError(f"{printable(path)}: line {number}: {text[:40]!r} is no count; {wanted}")
    return value


def _malformed(path: Path, number: int, width: int) -> InputError:
    wanted = "name,count" if width == 2 else "a name alone" if width == 1 else "name,count or a name"
    return InputError(f"{printable(path)}: line {number}: is not {wanted}, as the log has it from its first line")
