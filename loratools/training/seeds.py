"""Randomness that depends on a seed and on what it is for, never on what happened before in the process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from loratools._lazy import torch


def number_of(*parts: object) -> int:
    """A seed that depends on all of its parts, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Within the block torch's global generators start from these parts; afterwards they are as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(number_of(*parts))
        yield


def batch_of(n: int, size: int, step: int, seed: int) -> list[int]:
    """The rows of a step out of `n`: those of shuffled epochs, one after another, whatever was done before."""
    chosen: list[int] = []
    for place in range(step * size, (step + 1) * size):
        epoch, at = divmod(place, n)
        chosen.append(order(n, seed, epoch)[at])
    return list(dict.fromkeys(chosen))  # a batch over two epochs may name a row twice


@lru_cache(maxsize=4)
def order(n: int, seed: int, epoch: int = 0) -> tuple[int, ...]:
    """A shuffle of `n` things."""
    generator = torch.Generator().manual_seed(number_of(seed, "epoch", epoch))
    return tuple(torch.randperm(n, generator=generator).tolist())
