"""Sparse: places in low bits and a unary string, written bit by bit, or as one bit for every place."""

from __future__ import annotations

import numpy as np
import torch
from family_examples.base import Example, f64, rand

from loratools.families import SparseEntries
from loratools.families.base import Layout


def as_bytes(bits: list[int]) -> list[int]:
    bits = bits + [0] * (-len(bits) % 8)
    return [sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]


def told(places: list[int], size: int) -> list[int]:
    """The fewest bytes, over all numbers of low bits, or one bit for every place."""
    found = [as_bytes([int(p in places) for p in range(size)])]
    for width in range(1, 30):
        low = [(p >> i) & 1 for p in places for i in range(width)]
        high = [0] * (len(places) + ((size - 1) >> width))
        for i, p in enumerate(places):
            high[(p >> width) + i] = 1
        found.append(as_bytes(low) + as_bytes(high))
    return min(found, key=len)


def _example(m: int, n: int, places: list[int], scale: float = 1.0, *, transposed: bool = False) -> Example:
    values = rand(len(places), len(places))
    delta = np.zeros(m * n)
    delta[places] = scale * f64(values)
    delta = delta.reshape(m, n)
    tensors = {
        "sparse_values": values,
        "sparse_places": torch.tensor(told(places, m * n), dtype=torch.uint8),
    }
    base = rand(1, n, m) if transposed else rand(1, m, n)  # for its shape alone
    delta = delta.T if transposed else delta
    return Example(SparseEntries, tensors, delta, scale=scale, layout=Layout(transposed=transposed), base=base)


EXAMPLES = {
    "few": _example(40, 30, [0, 17, 18, 600, 1199]),
    "one": _example(9, 7, [62], -0.5),
    "many": _example(6, 5, [0, 1, 4, 5, 6, 9, 11, 12, 17, 20, 21, 29], 2.0),
    "quarter": _example(8, 8, list(range(3, 64, 4))),
    "transposed": _example(12, 10, [5, 7, 80, 119], transposed=True),
}
