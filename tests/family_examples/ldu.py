"""LDU: triangular factors by columns and rows, with their pivots."""

from __future__ import annotations

import numpy as np
import torch
from family_examples.base import Example

from loratools.families import LDU


def _triangle(values: np.ndarray, size: int, pivots: list[int]) -> np.ndarray:
    """Columns of ones at the pivots, the values below, in the order pivots first."""
    order = [*pivots, *(i for i in range(size) if i not in pivots)]
    whole, at = np.zeros((size, len(pivots))), 0
    for k in range(len(pivots)):
        whole[order[k], k] = 1
        for i in range(k + 1, size):
            whole[order[i], k] = values[at]
            at += 1
    return whole


def _example(scale: float, m: int, n: int) -> Example:
    generator = torch.Generator().manual_seed(m)
    rank = 2
    tensors = {
        "ldu_l": torch.randn(m * rank - 3, generator=generator),
        "ldu_d": torch.randn(rank, generator=generator),
        "ldu_u": torch.randn(n * rank - 3, generator=generator),
        "ldu_rows": torch.tensor([4, 1], dtype=torch.int16),
        "ldu_columns": torch.tensor([0, 3], dtype=torch.int16),
    }
    left = _triangle(tensors["ldu_l"].double().numpy(), m, [4, 1])
    right = _triangle(tensors["ldu_u"].double().numpy(), n, [0, 3])
    delta = scale * left @ np.diag(tensors["ldu_d"].double().numpy()) @ right.T
    return Example(LDU, tensors, delta, scale=scale)


EXAMPLES = {"tall": _example(1.0, 7, 5), "wide_scaled": _example(-0.5, 5, 8)}
