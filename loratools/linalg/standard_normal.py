"""Means over a standard normal variable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_REACH, _STEPS = 12.0, 48_001  # beyond, the density is 1e-32; 0 is a point of the grid, where a ReLU bends


def mean_slope(act: Callable[[Tensor], Tensor]) -> float:
    """E act'(z) for a standard normal z, to 1e-7 for functions that bend at 0; by Stein's lemma it is E z act(z)."""
    z = torch.linspace(-_REACH, _REACH, _STEPS, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float((z * act(z) * density).sum() * (2 * _REACH / (_STEPS - 1)))
