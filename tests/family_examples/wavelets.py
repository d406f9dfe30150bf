"""Families of wavelets: explicit transform matrices, tap by tap."""

from __future__ import annotations

import numpy as np
import pywt
import torch
from family_examples.base import F64, Example, f64, rand

from loratools.families import WaRA, WaveletBands, WaveletSparse
from loratools.families.base import Layout
from loratools.families.places import pack_places


def _one_level(size: int, name: str) -> F64:
    low, high = pywt.Wavelet(name).dec_lo, pywt.Wavelet(name).dec_hi
    half, whole = size // 2, np.zeros((size, size))
    for k in range(half):
        for j in range(len(low)):
            place = (2 * k + len(low) // 2 - j) % (2 * half)
            whole[k, place] += low[j]
            whole[size - half + k, place] += high[j]
    if size % 2:
        whole[half, size - 1] = 1
    return whole


def _inverse(coefficients: F64, name: str, levels: int) -> F64:
    """The coarsest level first: each undone by the transposed matrices of its two sides."""
    sizes = [coefficients.shape]
    for _ in range(levels - 1):
        m, n = sizes[-1]
        sizes.append((m - m // 2, n - n // 2))
    out = coefficients.copy()
    for m, n in reversed(sizes):
        out[:m, :n] = _one_level(m, name).T @ out[:m, :n] @ _one_level(n, name)
    return out


def _bands(m: int, n: int, levels: int) -> list[tuple[slice, slice]]:
    found: list[tuple[slice, slice]] = []
    for level in range(levels):
        p, q = m - m // 2, n - n // 2
        near, far = (slice(0, p), slice(p, m)), (slice(0, q), slice(q, n))
        found = [(near[0], far[1]), (near[1], far[0]), (near[1], far[1]), *found]
        if level == levels - 1:
            found = [(near[0], far[0]), *found]
        m, n = p, q
    return found


def _low_rank(
    shape: tuple[int, int], name: str, ranks: list[int], scale: float = 1.0, *, transposed: bool = False
) -> Example:
    m, n = shape
    whole, lefts, rights = np.zeros(shape), [], []
    levels = (len(ranks) - 1) // 3
    for i, (rank, (rows, columns)) in enumerate(zip(ranks, _bands(m, n, levels), strict=True)):
        left, right = rand(i, rows.stop - rows.start, rank), rand(i + 50, columns.stop - columns.start, rank)
        whole[rows, columns] = f64(left) @ f64(right).T
        lefts.append(left.flatten())
        rights.append(right.flatten())
    tensors = {
        "wavelet_left": torch.cat(lefts),
        "wavelet_right": torch.cat(rights),
        "wavelet_ranks": torch.tensor(ranks, dtype=torch.int32),
    }
    delta = scale * _inverse(whole, name, levels)
    base = rand(9, *(shape[::-1] if transposed else shape))  # for its shape alone
    layout, settings = Layout(transposed=transposed), {"wavelet": name}
    return Example(WaveletBands, tensors, delta.T if transposed else delta, scale, layout, settings, base)


def _sparse(shape: tuple[int, int], name: str, levels: int, scale: float = 1.0) -> Example:
    size = shape[0] * shape[1]
    places = torch.randperm(size, generator=torch.Generator().manual_seed(size))[: size // 3].sort().values
    values = rand(3, len(places))
    whole = np.zeros(size)
    whole[places.numpy()] = f64(values)
    tensors = {"wavelet_values": values, "wavelet_places": pack_places(places, size)}
    delta = scale * _inverse(whole.reshape(shape), name, levels)
    settings = {"wavelet": name, "levels": levels}
    return Example(WaveletSparse, tensors, delta, scale, settings=settings, base=rand(9, *shape))


def _wara(scale: float, m: int, n: int) -> Example:
    up, down = rand(0, m // 2, 2), rand(1, 2, n // 2)
    pairs = _one_level(m, "db1"), _one_level(n, "db1")
    shared = np.kron(np.eye(2), f64(up) @ f64(down))  # the same map for approximations and details
    return Example(WaRA, {"wara_up": up, "wara_down": down}, scale * pairs[0].T @ shared @ pairs[1], scale)


EXAMPLES = {
    "bands": _low_rank((12, 8), "db1", [2, 1, 0, 3]),
    "bands_odd": _low_rank((11, 14), "db2", [1, 2, 1, 0], -0.5),
    "bands_deep": _low_rank((20, 13), "sym4", [1, 0, 2, 1, 3, 0, 1, 1, 2, 1]),
    "bands_transposed": _low_rank((12, 9), "db3", [2, 1, 1, 1], transposed=True),
    "sparse": _sparse((12, 8), "db1", 1),
    "sparse_odd": _sparse((11, 9), "db2", 1, -0.5),
    "sparse_deep": _sparse((20, 13), "coif1", 3),
    "wara": _wara(1.0, 8, 6),
    "wara_scaled": _wara(-0.5, 4, 10),
}
