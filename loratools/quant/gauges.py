"""Rotations of the rank space, (up Q)(Q^T down) = up down: the pair that loses least when it is rounded.

Singular vectors of one precision differ in length and have outliers; a rotation among them spreads both evenly, and a
decoder never learns of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Gauge = Literal["svd", "hadamard", "random", "learned"]
_TURNS = 10  # alternations of signs and rotation


def rotation(up: Tensor, down: Tensor, heights: Sequence[int], gauge: Gauge, seed: int) -> Tensor:
    """An orthogonal (r, r) matrix, block by block of `heights` components; the rest are left alone."""
    out = torch.eye(up.shape[1], dtype=up.dtype, device=up.device)
    start = 0
    for height in heights:
        stop = start + height
        if height > 1 and gauge != "svd":
            out[start:stop, start:stop] = _block(up[:, start:stop], down[start:stop], gauge, seed)
        start = stop
    return out


def _block(up: Tensor, down: Tensor, gauge: Gauge, seed: int) -> Tensor:
    if gauge == "hadamard" and (up.shape[1] & (up.shape[1] - 1)) == 0:
        return hadamard(up.shape[1]).to(up)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(up.shape[1], up.shape[1], generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    spin = (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).to(up)
    return learned(torch.cat([up, down.T]), spin) if gauge == "learned" else spin


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of order `size`, a power of two, orthonormal; float64."""
    out = torch.ones(1, 1, dtype=torch.float64)
    while out.shape[0] < size:
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    return out / math.sqrt(size)


def learned(x: Tensor, spin: Tensor) -> Tensor:
    """The rotation of the rows of x (p, r) that brings them near signs times one scale, by turns with the signs.

    Iterative quantisation (Gong and Lazebnik 2011): the rotation is the Procrustes solution for the signs, and so on.
    """
    for _ in range(_TURNS):
        signs = torch.where(x @ spin < 0, -1.0, 1.0).to(x)
        u, _, vt = torch.linalg.svd(x.T @ signs)
        spin = u @ vt
    return spin
