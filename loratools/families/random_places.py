"""Where the coefficients of FourierFT and WaveFT lie: the first of a random permutation of all entries."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor


def scattered(values: Tensor, seed: int, shape: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """Zeros (padded), float64, with the values in their places in the middle (m, n) of it.

    As PEFT draws the places with torch's CPU generator; AdapterError for more values than entries.
    """
    m, n = shape
    if values.numel() > m * n:
        raise AdapterError(f"{values.numel()} coefficients do not fit a base weight {shape}; is it the right base?")
    places = drawn(m * n, values.numel(), seed)
    dense = torch.zeros(padded, dtype=torch.float64)
    rows, columns = places // n + (padded[0] - m) // 2, places % n + (padded[1] - n) // 2
    dense[rows, columns] = values.double()
    return dense


def check_spectrum(slot: str, shape: tuple[int, ...]) -> str | None:
    """What is wrong with the shape of a tensor that should be a vector, or None."""
    return None if len(shape) == 1 and 0 not in shape else f"{slot} {shape} is no vector of coefficients"


@lru_cache(maxsize=16)  # the permutation is as large as the weight, and layers share it
def drawn(entries: int, count: int, seed: int) -> Tensor:
    """The first `count` of a random order of so many entries, flat, as PEFT draws them."""
    return torch.randperm(entries, generator=torch.Generator().manual_seed(seed))[:count].clone()
