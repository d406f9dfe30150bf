"""The exact thin SVD of factored matrices, batched, without ever forming left @ right.

With Cholesky factors of the two r x r Gram matrices, left^T left = P P^T and right right^T = Q Q^T, the singular
values of left @ right are those of the r x r core P^T Q = U S V^T, and

    left @ right = [left Q V S^-1] S [S^-1 U^T P^T right]

so that no triangular solve is needed. Products of float32, bfloat16 or float16 entries are exact in float64; where a
Gram matrix is nonetheless ill-conditioned, that member of the batch goes through two thin QR factorisations instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

# Smallest share of a column's squared norm that may lie outside the span of the columns before it. Rounding leaves a
# Cholesky pivot an error near r * 1e-16 of that norm: at this bound the pivot still has eight correct digits.
MIN_PIVOT = 1e-6
# A sum below this share of its terms' magnitudes is done again: above, rounding leaves it six correct digits.
CANCELLATION = 1e-9


@dataclass(frozen=True, eq=False)
class Factored:
    """A batch of factored matrices with what every question about them shares."""

    left: Tensor  # (b, m, r) float64
    right: Tensor  # (b, r, n) float64
    left_gram: Tensor  # (b, r, r)
    right_gram: Tensor  # (b, r, r)


@dataclass(frozen=True, eq=False)
class Balanced:
    """Best rank-k factors, balanced: up = U sqrt(S), down = sqrt(S) V^T, with the whole spectrum."""

    up: Tensor  # (b, m, k) float64
    down: Tensor  # (b, k, n) float64
    spectrum: Tensor  # (b, min(m, n, r)) float64, descending


def factored(left: Tensor, right: Tensor) -> Factored:
    """Cast to float64 and form both Gram matrices; left is (b, m, r), right is (b, r, n)."""
    left, right = left.double(), right.double()
    return Factored(left, right, left.mT @ left, right @ right.mT)


def is_finite(f: Factored) -> Tensor:
    """Which members hold no NaN or infinity, as a (b,) bool tensor; a Gram diagonal cannot hide one."""
    return torch.isfinite(f.left_gram.diagonal(dim1=-2, dim2=-1).sum(-1)) & torch.isfinite(
        f.right_gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    )


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor and, per member, whether it can be trusted."""
    lower, info = torch.linalg.cholesky_ex(gram)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    sound = (info == 0) & (pivots > MIN_PIVOT * gram.diagonal(dim1=-2, dim2=-1)).all(-1)
    return lower, sound


def singular_values(f: Factored) -> Tensor:
    """All min(m, n, r) singular values, descending, as a (b, min(m, n, r)) float64 tensor."""
    p, p_sound = _cholesky(f.left_gram)
    q, q_sound = _cholesky(f.right_gram)
    sound = p_sound & q_sound
    count = min(f.left.shape[1], f.left.shape[2], f.right.shape[2])
    if bool(sound.all()):
        return torch.linalg.svdvals(p.mT @ q)[:, :count]
    out = f.left.new_empty(f.left.shape[0], count)
    if bool(sound.any()):
        out[sound] = torch.linalg.svdvals(p[sound].mT @ q[sound])[:, :count]
    out[~sound] = torch.linalg.svdvals(_qr_core(f.left[~sound], f.right[~sound])[1])[:, :count]
    return out


def balanced_factors(f: Factored, rank: int) -> Balanced:
    """The Eckart-Young optimum of rank `rank` (at most min(m, n, r)), with deterministic signs.

    The entry of largest magnitude of each column of `up` is positive (the first such, where several tie).
    """
    p, p_sound = _cholesky(f.left_gram)
    q, q_sound = _cholesky(f.right_gram)
    sound = p_sound & q_sound
    if bool(sound.all()):
        up, down, spectrum = _by_cholesky(f.left, f.right, p, q, rank)
    elif not bool(sound.any()):
        up, down, spectrum = _by_qr(f.left, f.right, rank)
    else:
        b, m, _ = f.left.shape
        count = min(m, f.left.shape[2], f.right.shape[2])
        up, down = f.left.new_empty(b, m, rank), f.left.new_empty(b, rank, f.right.shape[2])
        spectrum = f.left.new_empty(b, count)
        parts = _by_cholesky(f.left[sound], f.right[sound], p[sound], q[sound], rank)
        up[sound], down[sound], spectrum[sound] = parts
        up[~sound], down[~sound], spectrum[~sound] = _by_qr(f.left[~sound], f.right[~sound], rank)
    signs = column_signs(up)
    return Balanced(up * signs, down * signs.mT, spectrum)


def column_signs(u: Tensor) -> Tensor:
    """(..., 1, k) of +-1 that make the largest entry of each column positive; +1 for a zero column."""
    peak = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True))
    return torch.where(peak < 0, -1.0, 1.0).to(u.dtype)


def _by_cholesky(left: Tensor, right: Tensor, p: Tensor, q: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(p.mT @ q)
    inverse_root = s[:, :rank].rsqrt().unsqueeze(-1)  # sound factors have full rank: no zero here
    up = ((vt[:, :rank] * inverse_root) @ q.mT @ left.mT).mT  # thin from the left: twice as fast as left @ (...)
    down = ((u[:, :, :rank] * inverse_root.mT).mT @ p.mT) @ right
    return up, down, s[:, : min(left.shape[1], right.shape[2])]


def _qr_core(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    return q_left, r_left @ r_right.mT, q_right


def _by_qr(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    q_left, core, q_right = _qr_core(left, right)
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    root = s[:, :rank].sqrt().unsqueeze(-2)
    return (q_left @ u[:, :, :rank]) * root, (q_right @ vt[:, :rank].mT * root).mT, s


def squared_distance(f: Factored, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(||left right - up down||_F^2, ||left right||_F^2) per member, each a (b,) float64 tensor.

    From Gram matrices, unless their terms cancel: members whose result is within rounding of the terms go through QR.
    """
    up, down = up.double(), down.double()
    norms = f.left_gram * f.right_gram
    crosses = (up.mT @ f.left).mT * (f.right @ down.mT)
    own = ((up.mT @ up) * (down @ down.mT)).sum((-2, -1))
    norm = norms.sum((-2, -1))
    distance = norm - 2 * crosses.sum((-2, -1)) + own
    terms = norms.abs().sum((-2, -1))  # what rounding is relative to; far above the norm for badly scaled factors
    lost = norm <= CANCELLATION * terms
    if bool(lost.any()):
        norm[lost] = _qr_core(f.left[lost], f.right[lost])[1].square().sum((-2, -1))
    unresolved = distance <= CANCELLATION * (terms + 2 * crosses.abs().sum((-2, -1)) + own)
    if bool(unresolved.any()):
        lefts = torch.cat([f.left[unresolved], -up[unresolved]], dim=-1)
        rights = torch.cat([f.right[unresolved], down[unresolved]], dim=-2)
        distance[unresolved] = _qr_core(lefts, rights)[1].square().sum((-2, -1))
    return distance, norm
