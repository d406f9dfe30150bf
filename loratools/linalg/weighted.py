"""Best low-rank factors where errors count by the inputs that meet them: ||delta C^(1/2)||, with C = E[x x^T].

Of C only the moment M = right C right^T is needed, r x r (SVD-LLM, arXiv 2403.07378, for a matrix that is factored).
With right = T V^T, V^T orthonormal, and V^T C V = L L^T,

    left @ right = (left T L) (L^-1 V^T) = U S W^T L^-1 V^T

and the first k components are the optimum of rank k in that norm, for (left T L) has the singular values of
left right C^(1/2). Going through V makes the result the same whatever gauge the factors are in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.linalg.factored import column_signs

if TYPE_CHECKING:
    from torch import Tensor

# Least share of the mean energy that a direction of the inputs is taken to have: none drops out for lack of data.
FLOOR = 1e-8
# Rows of `right` that are this small beside its largest singular value are rounding.
_RANK = 1e-13


def weighted_factors(left: Tensor, right: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(up (m, k), down (k, n), s (k,)) in float64, with up @ down = left @ right and k = min(m, r, n).

    left is (m, r), right (r, n), `moment` E[(right x)(right x)^T]. The first columns and rows are the optimum of their
    rank in ||delta C^(1/2)||, with the singular values `s` there, descending; up = U sqrt(S), with signs as in
    `balanced_factors`. A direction that no input had counts as if it had 1e-8 of the mean energy.
    """
    rank = left.shape[1]
    if tuple(moment.shape) != (rank, rank):
        raise AdapterError(f"a moment of shape {tuple(moment.shape)} does not fit factors of rank {rank}")
    left, right, moment = left.double(), right.double(), moment.double()
    basis, core = torch.linalg.qr(right.T)  # (n, q), (q, r)
    turn, sizes, inner = torch.linalg.svd(core.T, full_matrices=False)  # (r, q), (q,), (q, q)
    rows = inner @ basis.T  # V^T: (q, n), orthonormal
    tall = left @ (turn * sizes)  # (m, q)
    inverse = torch.where(sizes > _RANK * sizes[:1], 1 / sizes, 0.0)
    energies, axes = _energies((turn * inverse).T @ moment @ (turn * inverse))
    root = energies.sqrt()
    u, s, wt = torch.linalg.svd(tall @ (axes * root), full_matrices=False)
    signs = column_signs(u)
    scale = s.sqrt()
    down = (wt * signs.T * scale.unsqueeze(1)) @ ((axes / root).T @ rows)
    return u * signs * scale, down, s


def _energies(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Positive eigenvalues, floored, and eigenvectors of a moment in an orthonormal basis; (q,) and (q, q)."""
    moment = (moment + moment.T) / 2
    mean = moment.diagonal().mean()
    if not bool(mean > 0):  # no input at all: every direction counts alike
        return torch.ones_like(moment[0]), torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    energies, axes = torch.linalg.eigh(moment)
    return energies.clamp(min=FLOOR * float(mean)), axes
