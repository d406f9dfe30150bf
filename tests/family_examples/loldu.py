"""LoLDU: an elimination with row exchanges written out, and the pivots changed one by one."""

from __future__ import annotations

import numpy as np
import torch
from family_examples.base import Example, rand

from loratools.families import LoLDU
from loratools.families.base import Layout


def _factors(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P L, the pivots, and U with ones on its diagonal, by the textbook in float32."""
    m, n = weight.shape
    left, order = np.array(weight, dtype=np.float32), list(range(m))
    lower = np.zeros((m, min(m, n)), dtype=np.float32)
    for k in range(min(m, n)):
        best = k + int(np.argmax(np.abs(left[k:, k])))
        left[[k, best]], lower[[k, best]] = left[[best, k]], lower[[best, k]]
        order[k], order[best] = order[best], order[k]
        lower[k, k] = 1
        for i in range(k + 1, m):
            lower[i, k] = left[i, k] / left[k, k]
            left[i] = left[i] - lower[i, k] * left[k]
    placed = np.zeros_like(lower)
    for row, where in enumerate(order):
        placed[where] = lower[row]
    pivots = np.diag(left).astype(np.float64)
    return placed.astype(np.float64), pivots, left[: len(pivots)].astype(np.float64) / pivots[:, None]


def _example(m: int, n: int, rank: int, scale: float, *, transposed: bool = False) -> Example:
    weight = rand(m, m, n)
    left, pivots, right = _factors(weight.numpy())
    z = torch.from_numpy(pivots[:rank]).float() + 0.5 * rand(n, rank)
    delta = np.zeros((m, n))
    for i in range(rank):
        delta += scale * (float(z[i]) - pivots[i]) * np.outer(left[:, i], right[i])
    base = weight.T.contiguous() if transposed else weight
    return Example(
        LoLDU, {"loldu_z": z}, delta.T if transposed else delta, scale, Layout(transposed=transposed), base=base
    )


EXAMPLES = {
    "tall": _example(9, 6, 4, 0.25),
    "wide_full": _example(5, 8, 5, 1.0),
    "transposed": _example(6, 7, 3, -2.0, transposed=True),
}
