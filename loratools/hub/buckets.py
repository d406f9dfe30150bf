"""Rank buckets: the few ranks to which the ranks of a hub are rounded up with the least padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from loratools.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def rank_buckets(
    ranks: NDArray[np.int64], weights: NDArray[np.float64], count: int, *, allowed: Sequence[int] = ()
) -> tuple[int, ...]:
    """At most `count` ascending ranks R, of `allowed` where given, that minimise the padding.

    That is the sum of weight * (R - rank), each rank with the least R that holds it: the optimum, by dynamic
    programming over the distinct values in O(d^2 count). Among equal optima the fewest buckets are taken. Raises
    UsageError for no bucket, and where no allowed rank holds the largest.
    """
    if count < 1:
        raise UsageError(f"{count} buckets: give at least 1")
    distinct, inverse = np.unique(ranks, return_inverse=True)
    weight = np.bincount(inverse, weights=weights, minlength=len(distinct))
    ends = distinct if not allowed else _allowed_ends(distinct, allowed)
    places = np.searchsorted(distinct, ends, side="right")  # (e,) how many distinct ranks each end holds
    below = np.concatenate([[0.0], np.cumsum(weight)])[places]
    taken = np.concatenate([[0.0], np.cumsum(weight * distinct)])[places]
    # cost[i, j]: all ranks above the end i, -1 for none, and up to the end j are padded to j.
    padded = (below[None, :] - np.concatenate([[0.0], below])[:, None]) * ends[None, :]
    cost = padded - (taken[None, :] - np.concatenate([[0.0], taken])[:, None])
    cost[np.arange(len(ends) + 1)[:, None] > np.arange(len(ends))[None, :]] = np.inf
    return _path(cost, ends, min(count, len(ends)))


def bucket_of(ranks: NDArray[np.int64], buckets: Sequence[int]) -> NDArray[np.int64]:
    """The index of the least bucket that holds each rank."""
    return np.searchsorted(np.asarray(buckets), ranks, side="left")


def _allowed_ends(distinct: NDArray[np.int64], allowed: Sequence[int]) -> NDArray[np.int64]:
    """The allowed ranks that are the least to hold some rank."""
    known = np.unique(np.asarray(allowed, np.int64))
    if distinct[-1] > known[-1]:
        raise UsageError(f"rank {distinct[-1]} is above {known[-1]}, the largest that is allowed")
    return np.unique(known[np.searchsorted(known, distinct, side="left")])


def _path(cost: NDArray[np.float64], ends: NDArray[np.int64], count: int) -> tuple[int, ...]:
    least = cost[0]  # (e,) of the ranks up to each end, in one bucket
    came: list[NDArray[np.int64]] = [np.full(len(ends), -1)]
    totals = [least[-1]]
    for _ in range(count - 1):
        through = least[:, None] + cost[1:]  # (e, e)
        came.append(np.argmin(through, axis=0))
        least = np.take_along_axis(through, came[-1][None, :], axis=0)[0]
        totals.append(least[-1])
    used = int(np.argmin(totals))  # the first: the fewest
    chosen, at = [], len(ends) - 1
    for step in range(used, -1, -1):
        chosen.append(int(ends[at]))
        at = int(came[step][at])
    return tuple(reversed(chosen))
