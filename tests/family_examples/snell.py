"""SNELL: distances one by one, a quantile by its definition, and what lies above it."""

from __future__ import annotations

import math

import numpy as np
import torch
from family_examples.base import F64, Example, f64, rand

from loratools.families import SNELL
from loratools.families.base import Layout


def _quantile(values: F64, share: float) -> float:
    ordered = np.sort(values.ravel())
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))


def _example(
    m: int, n: int, threshold: float | None, *, mixed: bool = False, stated: bool = True, transposed: bool = False
) -> Example:
    tensors = {"snell_in": rand(m, 2, n, 3), "snell_out": rand(n + 50, 2, m, 3)}
    if stated:
        tensors["snell_coefficients"] = torch.tensor([0.2, -0.1]).reshape(2, 1, 1)
    if mixed:
        for name, value in (("alpha", 0.5), ("gamma", 0.25), ("beta", 0.01)):
            tensors[f"snell_{name}"] = torch.tensor([value])
    weights = (0.2, -0.1) if stated else (0.1, -0.1)
    kernel = np.zeros((n, m))
    for a in range(n):
        for o in range(m):
            for h, weight in enumerate(np.float32(weights).astype(np.float64) if stated else weights):
                kernel[a, o] += weight * math.dist(f64(tensors["snell_in"])[h, a], f64(tensors["snell_out"])[h, o])
    if mixed:
        for row in kernel:
            soft = np.exp(row / 0.25 - np.max(row / 0.25))
            row += 0.5 * soft / soft.sum() + float(np.float32(0.01))
    if threshold is not None:
        tau = _quantile(np.abs(kernel), threshold)
        kernel = np.where(np.abs(kernel) > tau, np.sign(kernel) * kernel**2, 0.0)
    settings = {"is_kernel": True} if threshold is None else {"threshold": threshold}
    delta = 0.5 * kernel.T
    return Example(SNELL, tensors, delta.T if transposed else delta, 0.5, Layout(transposed=transposed), settings)


EXAMPLES = {
    "kernel": _example(5, 7, None),
    "sparse": _example(6, 5, 0.7),
    "between_two_entries": _example(5, 5, 0.43),
    "mixed": _example(6, 7, 0.5, mixed=True),
    "mixed_all": _example(4, 7, 0.0, mixed=True),
    "usual_coefficients": _example(4, 6, 0.5, stated=False),
    "transposed": _example(4, 6, 0.5, transposed=True),
}
