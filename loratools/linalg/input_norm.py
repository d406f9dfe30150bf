"""Errors as the inputs see them: ||delta C^(1/2)|| for any delta of a layer, from little that is known of C = E[x x^T].

Known are M = E[(down x)(down x)^T] of one factor `down` (r, n) and the mean squares of the channels. With P the
projection on the rows of `down`, C is taken to be

    P C P + (1 - P) diag(E[x_j^2]) (1 - P)

which is exact for whatever stays within the rows of `down`, as every lower rank of the delta does; what rounding adds
outside of them counts by the channels alone, as if these were uncorrelated, and as if they had nothing to do with what
lies within.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor

# Rows of `down` that are this small beside its largest singular value are rounding.
_RANK = 1e-13


@dataclass(frozen=True, eq=False)
class InputNorm:
    """A root of C by its parts, in float64."""

    basis: Tensor  # (n, q), orthonormal: the rows of `down`
    root: Tensor  # (q, q), symmetric: the root of basis^T C basis
    deviations: Tensor  # (n,): the roots of the channels' mean squares

    @classmethod
    def of(cls, down: Tensor, moment: Tensor, channels: Tensor) -> Self:
        """From `down` (r, n), its moment (r, r) and the mean squares (n,); AdapterError where these do not fit."""
        if tuple(moment.shape) != (len(down), len(down)) or len(channels) != down.shape[1]:
            raise AdapterError(
                f"a moment of shape {tuple(moment.shape)} and {len(channels)} channels do not fit a factor of shape "
                f"{tuple(down.shape)}"
            )
        turn, sizes, rows = torch.linalg.svd(down.double(), full_matrices=False)
        some = sizes > _RANK * sizes.max().clamp_min(1e-300)
        back = turn[:, some] / sizes[some]  # (r, q)
        inner = back.T @ moment.double() @ back
        energies, axes = torch.linalg.eigh((inner + inner.T) / 2)
        root = (axes * energies.clamp(min=0).sqrt()) @ axes.T
        return cls(rows[some].T.contiguous(), root, channels.double().clamp(min=0).sqrt())

    def times_root(self, right: Tensor) -> Tensor:
        """(k, n) times the root, as (k, q + n)."""
        wide = right.double()
        within = wide @ self.basis
        outside = (wide - within @ self.basis.T) * self.deviations
        return torch.cat([within @ self.root, outside], dim=1)

    def squared(self, delta: Operator) -> float:
        """||delta C^(1/2)||^2; of low rank by QR of its left factor, so that nothing cancels and nothing is m x n."""
        if not isinstance(delta, LowRank):
            return float(self.times_root(delta.to(torch.float64).dense()).square().sum())
        core = torch.linalg.qr(delta.left.double() * delta.scale, mode="r")[1]
        return float((core @ self.times_root(delta.right)).square().sum())
