"""Work on an adapter's targets side by side, in bounded memory and in a fixed order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from loratools._lazy import torch

T = TypeVar("T")
R = TypeVar("R")


_WORTH = 8 << 20  # bytes of factors below which threads take longer to hand out than they save


def worker_count(device: str, nbytes: int | None = None) -> int:
    """Threads that keep the machine busy: one for each CPU that this process may use, two to feed an accelerator.

    LORATOOLS_THREADS in the environment says how many instead, for processes that share a machine. For factors of
    little `nbytes` that are only decomposed one is the fastest.
    """
    if device != "cpu":
        return 2
    if nbytes is not None and nbytes < _WORTH:
        return 1
    if (stated := os.environ.get("LORATOOLS_THREADS", "")).isdecimal() and int(stated):
        return int(stated)
    return min(usable_cores(), 16)


def usable_cores() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(fn: Callable[[T], R], items: Iterable[T], *, workers: int) -> Generator[R, None, None]:
    """fn(item) in the order of `items`, computed by `workers` threads that run at most two items ahead each.

    Every thread computes on one core, so that results do not depend on the number of cores. The first exception is
    raised in its place, and whatever has not begun by then never does. A single worker is the caller's own thread.
    """
    threads = torch.get_num_threads()
    if workers == 1:
        for item in items:
            torch.set_num_threads(1)
            try:
                result = fn(item)
            finally:
                torch.set_num_threads(threads)
            yield result
        return
    pool = ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1))
    try:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(fn, item))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def begun(fn: Callable[[], R]) -> Callable[[], R]:
    """`fn`, begun now on a thread of its own; calling the result waits for it, then returns or raises what it did."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(fn)
    pool.shutdown(wait=False)
    return future.result


def batches(items: Iterable[T], *, key: Callable[[T], Hashable], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Group items of equal key, in the order in which each key first appears, into lists of at most `limit` bytes."""
    open_batches: dict[Hashable, list[T]] = {}
    used: dict[Hashable, int] = {}
    result: list[list[T]] = []
    for item in items:
        k, n = key(item), size(item)
        if k not in open_batches or used[k] + n > limit:
            open_batches[k], used[k] = [], 0
            result.append(open_batches[k])
        open_batches[k].append(item)
        used[k] += n
    return result
