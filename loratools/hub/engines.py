"""Where the work is done: processes of this machine, or the workers of a Dask cluster, behind one interface."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from loratools.errors import MissingExtraError, UsageError
from loratools.pipeline import usable_cores

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # jobs in hand for each worker
_KEPT_FREE = 8 << 20  # bytes
_CRASHES = 2  # of workers, after which the job in hand is given up
_DIED = "the worker died while at it, twice; perhaps for lack of memory"


def local_executor(workers: int) -> Executor:
    """A pool of processes that share the cores of this machine, or have as many each as LORATOOLS_THREADS says."""
    threads = os.environ.get("LORATOOLS_THREADS") or str(max(1, usable_cores() // workers))
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    return ProcessPoolExecutor(workers, context, _begin, (threads,))


def dask_executor(scheduler: str) -> Executor:
    """The workers of a cluster; MissingExtraError without Dask, UsageError where there is none at the address."""
    try:
        from distributed import Client
    except ImportError:
        raise MissingExtraError("--engine dask needs Dask distributed: pip install 'loratools[hub]'") from None
    try:
        client = Client(scheduler, set_as_default=False, timeout="5s")
    except (OSError, ValueError) as error:
        raise UsageError(f"no Dask scheduler at {scheduler}: {str(error).splitlines()[0]}") from None
    return _Cluster(client)


class _Cluster(Executor):
    """A client's own executor, with the client closed after it."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._inner: Executor = client.get_executor(pure=False, retries=_CRASHES)

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        return self._inner.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._inner.shutdown(wait=wait)
        self._client.close()


def _begin(threads: str) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    os.environ["LORATOOLS_THREADS"] = threads  # targets side by side, each on one core
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what torch consists of is never garbage
    # glibc gives freed memory back at once, to have the same pages cleared for the next adapter, until it has seen one
    # block of this size freed; from then on it keeps up to twice as much.
    bytearray(_KEPT_FREE)


def outcomes(
    make: Callable[[], Executor],
    work: Callable[[T], R],
    jobs: Iterable[T | None],
    *,
    workers: int,
    given_up: Callable[[T, str], R],
) -> Iterator[R]:
    """work(job) of every job as it is done, a few in hand at a time; `given_up` makes what comes of a hopeless one.

    Where a worker of this machine dies the pool is made anew: the jobs that were in hand are done again one at a time,
    so that the one that kills its worker is known, and no other is lost. A cluster sees to that itself. A None among
    the jobs puts off the next one until something in hand is done.
    """
    waiting = iter(jobs)
    executor = make()
    try:
        in_hand: dict[Future[R], T] = {}
        while True:
            while len(in_hand) < _AHEAD * workers and (job := next(waiting, None)) is not None:
                in_hand[_submitted(executor, work, job)] = job
            if not in_hand:
                break
            done, _ = wait(in_hand, return_when=FIRST_COMPLETED)
            broken = [future for future in done if isinstance(future.exception(), BrokenProcessPool)]
            for future in done:
                if future not in broken:
                    yield _outcome(future, in_hand.pop(future), given_up)
            if broken:
                suspects = list(in_hand.values())
                in_hand.clear()
                _stop(executor)
                for job in suspects:
                    yield _alone(make, work, job, given_up)
                executor = make()
    finally:
        _stop(executor)


def in_order(
    make: Callable[[], Executor],
    work: Callable[[T], R],
    jobs: Iterable[T],
    *,
    workers: int,
    given_up: Callable[[T, str], R],
    ready: Callable[[T], R | None] = lambda job: None,
    ahead: int = 1024,
) -> Iterator[R]:
    """What `outcomes` gives, in the order of the jobs, none of which gets more than `ahead` places before a slow one.

    What `ready` knows of a job needs no worker; without any other no worker is started.
    """
    done: dict[int, R] = {}
    following = 0

    def numbered() -> Iterator[tuple[int, T] | None]:
        for number, job in enumerate(jobs):
            while number >= following + ahead:
                yield None  # for the moment: the slow one is in hand, and `outcomes` asks again after it
            yield number, job

    for number, outcome in outcomes(
        lambda: _Prepared(make, lambda job: ready(job[1])),
        partial(_keeping_number, work),
        numbered(),
        workers=workers,
        given_up=lambda job, reason: (job[0], given_up(job[1], reason)),
    ):
        done[number] = outcome
        while following in done:
            yield done.pop(following)
            following += 1


def _submitted(executor: Executor, work: Callable[[T], R], job: T) -> Future[R]:
    """The future of a job; of a pool that has broken since it was looked at, one that says so as the others do."""
    try:
        return executor.submit(work, job)
    except BrokenProcessPool as error:
        refused: Future[R] = Future()
        refused.set_exception(error)
        return refused


def _keeping_number(work: Callable[[T], R], job: tuple[int, T]) -> tuple[int, R]:
    return job[0], work(job[1])


class _Prepared(Executor):
    """An executor that is made when there is work for it: of which no outcome is known already."""

    def __init__(self, make: Callable[[], Executor], ready: Callable[[Any], Any]) -> None:
        self._make, self._ready = make, ready
        self._inner: Executor | None = None

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        (job,) = args
        if (outcome := self._ready(job)) is not None:
            known: Future[Any] = Future()
            known.set_result((job[0], outcome))
            return known
        if self._inner is None:
            self._inner = self._make()
        return self._inner.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._inner is not None:
            self._inner.shutdown(wait=wait, cancel_futures=cancel_futures)


def _outcome(future: Future[R], job: T, given_up: Callable[[T, str], R]) -> R:
    error = future.exception()
    if error is None:
        return future.result()
    died = type(error).__name__ == "KilledWorker"  # of Dask, which is not imported where it is not used
    return given_up(job, _DIED if died else " ".join(str(error).split()) or type(error).__name__)


def _alone(make: Callable[[], Executor], work: Callable[[T], R], job: T, given_up: Callable[[T, str], R]) -> R:
    for _ in range(_CRASHES):
        executor = make()
        try:
            future = _submitted(executor, work, job)
            if not isinstance(future.exception(), BrokenProcessPool):
                return _outcome(future, job, given_up)
        finally:
            _stop(executor)
    return given_up(job, _DIED)


def _stop(executor: Executor) -> None:
    with suppress(Exception):  # what is stopped anyhow may be broken in any way
        executor.shutdown(wait=True, cancel_futures=True)
