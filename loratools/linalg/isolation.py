"""Whether a Ritz value of a block Krylov run has exactly one singular value near it: a proof from what the run holds.

Let A V = U B and A^T U = V B^T + N R E^T after some blocks, with V beginning with the orthonormalised Gaussian block
G = V_0 R_0, and B = P diag(t) Q^T. For a singular triplet (s, u, v) of A the coordinates of v in the Ritz basis are

    z_i = -t_i (C w)_i / (t_i^2 - s^2),        C = P_last^T R^T,  w = N^T v,

so V_0^T v is q_j z_j plus F(s) w, where F gathers all terms but the j-th and |w| <= 1. If F is small in a window around
t_j, then R_0^T V_0^T v = G^T v is nearly along one vector for every singular value in the window; but for two of them
these are independent Gaussian vectors, which hardly ever are. F is analytic around t_j, so that samples on a circle
bound it within. The proof is written out in docs/certificates.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLES = 32  # on a circle; an even number
_WIDER = 1.9  # radius of a circle on which terms alone bound F, in radii of the window; the nearest pole is at 2


@dataclass(frozen=True, eq=False)
class Ritz:
    """What a run holds, in float64: (k,) Ritz values, (b, k) first rows of Q, (k, b) C, and ||R_0||."""

    values: Tensor
    first: Tensor
    coupling: Tensor
    start_norm: float


def window(ritz: Ritz, j: int) -> float:
    """Half the distance of the j-th Ritz value to the next one."""
    values = ritz.values
    others = torch.cat([values[:j], values[j + 1 :]])
    return 0.5 * float((others - values[j]).abs().min()) if len(others) else 0.5 * float(values[j])


def is_isolated(ritz: Ritz, j: int, *, columns: int, rounding: float, failure: float) -> bool:
    """Whether at most one singular value of an operator with so many columns lies in the window of the j-th Ritz value.

    True is wrong with a probability of at most `failure` over the Gaussian start. `rounding` bounds how far the
    relations of the run are off.
    """
    radius, center = window(ritz, j), float(ritz.values[j])
    if not radius > 0:
        return False
    block = ritz.first.shape[0]
    rest = torch.arange(len(ritz.values)) != j
    values, first, coupling = ritz.values[rest], ritz.first[:, rest], ritz.coupling[rest]
    angles = math.pi * torch.arange(_SAMPLES // 2 + 1, dtype=torch.float64) / (_SAMPLES // 2)  # the rest are conjugate
    z = torch.complex(center + radius * angles.cos(), radius * angles.sin())
    terms = values / (values.square() - z.square().unsqueeze(1))  # (samples, k - 1)
    samples = (first * terms.unsqueeze(1)) @ coupling.to(terms.dtype)  # (samples, b, b)
    largest = float(torch.linalg.matrix_norm(samples).max())
    widest = float(coupling.norm()) / ((2 - _WIDER) * radius)  # of the terms on the wider circle
    beyond = 4 * widest * _WIDER**-_SAMPLES
    inside = math.sqrt(_SAMPLES) * largest + beyond + 2 * rounding / radius
    # Halko, Martinsson and Tropp 2011, proposition 10.4, for each pair of singular vectors
    pairs = max(1.0, columns * (columns - 1) / 2)
    least = (block - 1) / (math.e * math.sqrt(block)) * (failure / pairs) ** (1 / (block - 1))
    return math.sqrt(2) * ritz.start_norm * inside < least
