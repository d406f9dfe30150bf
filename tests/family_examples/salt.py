"""SALT: the middle matrix of the base's SVD, written out entry by entry."""

from __future__ import annotations

import numpy as np
import torch
from family_examples.base import F64, Example, f64, rand

from loratools.families import SALT
from loratools.families.base import Layout


def _middle(s: F64, a: F64, b: F64, block: F64) -> F64:
    """What the middle matrix becomes, less what it was."""
    k, top = len(s), len(a)
    whole = np.zeros((k, k))
    for i in range(top):
        whole[i, i] = max(a[i] * s[i] + b[i], 0.0) - s[i]
    for i in range(top, k):
        for j in range(top, k):
            old = s[i] if i == j else 0.0
            whole[i, j] = max(old + block[i - top, j - top], 0.0) - old
    return whole


def _example(shape: tuple[int, ...], top: int, rank: int, *, fixed: bool, transposed: bool = False) -> Example:
    weight = rand(sum(shape), *shape)
    flat = weight.flatten(1)
    u, s, vt = (f64(t) for t in torch.linalg.svd(flat, full_matrices=False))
    if fixed:
        for j in range(len(s)):
            if u[np.argmax(np.abs(u[:, j])), j] < 0:
                u[:, j], vt[j] = -u[:, j], -vt[j]
    tensors = {"salt_scale": 1 + rand(1, top) / 4, "salt_shift": rand(2, top)}
    block = np.zeros((len(s) - top, len(s) - top))
    if rank:
        tensors |= {"salt_x": rand(3, len(s) - top, rank), "salt_y": rand(4, rank, len(s) - top)}
        block = f64(tensors["salt_x"]) @ f64(tensors["salt_y"])
    delta = u @ _middle(s, f64(tensors["salt_scale"]), f64(tensors["salt_shift"]), block) @ vt
    settings = {"signs_fixed": True} if fixed else {}
    base = weight.T.contiguous() if transposed else weight
    delta = delta.T if transposed else delta.reshape(shape)
    return Example(SALT, tensors, delta, 1.0, Layout(transposed=transposed), settings, base)


EXAMPLES = {
    "wide": _example((7, 9), 2, 3, fixed=False),
    "tall_fixed_signs": _example((10, 6), 1, 2, fixed=True),
    "no_block": _example((6, 8), 3, 0, fixed=False),
    "convolution": _example((5, 3, 2, 2), 2, 2, fixed=True),
    "transposed": _example((6, 7), 2, 2, fixed=False, transposed=True),
}
