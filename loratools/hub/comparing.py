"""Exact comparisons as jobs of their own, for the workers of `hub similar`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from loratools.files import load
from loratools.hub.pairs import Regression, Shared, regress, shared
from loratools.hub.work import FAILURES, reason_of


@dataclass(frozen=True)
class PairJob:
    """An adapter and those that it is to be compared with, by their indices."""

    row: int
    path: Path
    others: tuple[tuple[int, Path], ...]


@dataclass(frozen=True)
class MergeJob:
    """An adapter and those that it may be a sum of."""

    row: int
    path: Path
    terms: tuple[tuple[int, Path], ...]


def confirm(job: PairJob) -> list[tuple[int, int, Shared | str]]:
    """The numbers of each pair, or why it has none; what fails together is tried one by one."""
    try:
        return _pairs(job, job.others)
    except FAILURES as error:
        if len(job.others) == 1:
            return pairs_given_up(job, reason_of(error))
        return [found for other in job.others for found in confirm(PairJob(job.row, job.path, (other,)))]


def pairs_given_up(job: PairJob, reason: str) -> list[tuple[int, int, Shared | str]]:
    """What comes of a job that cannot be done."""
    return [(job.row, other, reason) for other, _ in job.others]


def _pairs(job: PairJob, others: Sequence[tuple[int, Path]]) -> list[tuple[int, int, Shared | str]]:
    with ExitStack() as stack:
        first = stack.enter_context(load(job.path))
        rest = [stack.enter_context(load(path)) for _, path in others]
        numbers = shared(first, rest)
    return [(job.row, other, each) for (other, _), each in zip(others, numbers, strict=True)]


def confirm_merge(job: MergeJob) -> tuple[MergeJob, Regression | str]:
    """The best weights and the error of the sum, or why there are none."""
    try:
        with ExitStack() as stack:
            adapter = stack.enter_context(load(job.path))
            return job, regress(adapter, [stack.enter_context(load(path)) for _, path in job.terms])
    except FAILURES as error:
        return merge_given_up(job, reason_of(error))


def merge_given_up(job: MergeJob, reason: str) -> tuple[MergeJob, Regression | str]:
    """What comes of a job that cannot be done."""
    return job, reason
