"""QWHA in its two layouts: Hadamard matrices entry by entry."""

from __future__ import annotations

import numpy as np
import torch
from family_examples.base import F64, Example, f64, rand

from loratools.families import QHFT, QWHA
from loratools.families.base import Layout
from loratools.families.places import pack_places


def _hadamard(n: int) -> F64:
    """Sylvester's for powers of two; for 12 and 24 Paley's first, from the squares modulo 11, times Sylvester's."""
    k = 12 if n % 12 == 0 else 1
    signs = np.array([[(-1.0) ** bin(i & j).count("1") for j in range(n // k)] for i in range(n // k)])
    if k == 1:
        return signs
    squares = {i * i % 11 for i in range(1, 11)}
    chi = [0 if i == 0 else 1 if i in squares else -1 for i in range(11)]
    paley = np.ones((12, 12))
    paley[0, 1:] = -1
    for i in range(11):
        for j in range(11):
            paley[i + 1, j + 1] = 1 if i == j else -chi[(j - i) % 11]
    return np.kron(paley, signs)


def _packed(m: int, n: int, scale: float = 1.0, *, transposed: bool = False) -> Example:
    places = torch.randperm(m * n, generator=torch.Generator().manual_seed(m))[: m * n // 4].sort().values
    values = rand(0, len(places))
    sparse = np.zeros(m * n)
    sparse[places.numpy()] = f64(values)
    delta = scale * sparse.reshape(m, n) @ _hadamard(n) / n
    tensors = {"qwha_values": values, "qwha_places": pack_places(places, m * n)}
    base = rand(1, n, m) if transposed else rand(1, m, n)  # for its shape alone
    return Example(QWHA, tensors, delta.T if transposed else delta, scale, Layout(transposed=transposed), base=base)


def _authors(m: int, n: int, scale: float = 1.0) -> Example:
    rows, columns = [0, m - 1, 2, 2, 0], [1, n - 1, 3, 0, 1]  # the first place is named twice
    values = rand(3, len(rows))
    sparse = np.zeros((m, n))
    for i, j, value in zip(rows, columns, f64(values), strict=True):
        sparse[i, j] = value
    tensors = {
        "qhft_spectrum": values,
        "qhft_indices": torch.tensor([rows, columns], dtype=torch.int32),
        "qhft_scaling": torch.tensor(0.25),
        "qhft_n_frequency": torch.tensor(len(rows)),
    }
    delta = scale * 0.25 * (sparse @ _hadamard(n) / n) / np.sqrt(m)
    return Example(QHFT, tensors, delta, scale, base=rand(1, m, n))


EXAMPLES = {
    "packed": _packed(6, 8),
    "packed_paley": _packed(5, 24, -0.5),
    "packed_transposed": _packed(7, 12, transposed=True),
    "authors": _authors(6, 8),
    "authors_paley": _authors(9, 12, 2.0),
}
