"""Randomised SVD (Halko, Martinsson and Tropp 2011), for operators too wide for an exact one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.factored import column_signs

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.operators import Operator


def randomized_svd(
    op: Operator, rank: int, *, oversample: int = 8, power: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading `rank` triplets (u, s, vt) of `op`, whose tensors set dtype and device.

    `power` subspace iterations, orthonormalised at each half step; the sketch is drawn on the CPU, so that a seed means
    the same on every device. Shapes (m, rank), (rank,), (rank, n); signs as in `balanced_factors`.
    """
    m, n = op.shape
    if m < n:
        u, s, vt = _tall(op.T, rank, oversample, power, seed)
        u, vt = vt.T, u.T
    else:
        u, s, vt = _tall(op, rank, oversample, power, seed)
    signs = column_signs(u)
    return u * signs, s, vt * signs.T


def _tall(op: Operator, rank: int, oversample: int, power: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    m, n = op.shape
    width = min(rank + oversample, m, n)
    sketch = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = _orthonormal(op.matmat(sketch.to(op.leaf)))
    for _ in range(power):
        q = _orthonormal(op.matmat(_orthonormal(op.rmatmat(q))))
    u, s, vt = torch.linalg.svd(op.rmatmat(q).T, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vt[:rank]


def _orthonormal(x: Tensor) -> Tensor:
    return torch.linalg.qr(x)[0]
