"""The exact thin SVD of factored matrices, batched, without ever forming left @ right.

With Cholesky factors of the two r x r Gram matrices, left^T left = P P^T and right right^T = Q Q^T, the singular
values of left @ right are those of the r x r core P^T Q = U S V^T, and

    left @ right = [left Q V S^-1] S [S^-1 U^T P^T right]

so that no triangular solve is needed. Products of float32, bfloat16 or float16 entries are exact in float64; where a
Gram matrix is nonetheless ill-conditioned, that member of the batch goes through two thin QR factorisations instead.

Factors that are read from and written to 16 bits may be multiplied in float32, in which products of bfloat16 or float16
are exact too and only sums round: the core stays in float64, and any member for which single sums would show is done
again in double.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

# Smallest share of a column's squared norm that may lie outside the span of the columns before it. Rounding leaves a
# Cholesky pivot an error near r * 1e-16 of that norm (1e-7 in single precision): at these bounds the pivot still has
# eight correct digits (four, where 16-bit storage keeps fewer than three).
MIN_PIVOT = 1e-6
MIN_PIVOT_SINGLE = 1e-3
# Below this, squares that float32 cannot hold (1e-45) would matter to a sum of them.
MIN_SUM_SINGLE = 1e-28
# A sum below this share of its terms' magnitudes is done again: above, rounding leaves it six correct digits (three).
CANCELLATION = 1e-9
CANCELLATION_SINGLE = 1e-3


@dataclass(frozen=True, eq=False)
class Factored:
    """A batch of factored matrices with what every question about them shares."""

    left: Tensor  # (b, m, r) float64 or float32
    right: Tensor  # (b, r, n) likewise
    left_gram: Tensor  # (b, r, r) float64
    right_gram: Tensor  # (b, r, r) float64

    @property
    def is_single(self) -> bool:
        """Whether products are made in float32."""
        return self.left.dtype == torch.float32

    def members(self, chosen: Tensor) -> Factored:
        """Some members of the batch, in double precision."""
        return factored(self.left[chosen], self.right[chosen])


@dataclass(frozen=True, eq=False)
class Balanced:
    """Best rank-k factors, balanced: up = U sqrt(S), down = sqrt(S) V^T, with the whole spectrum."""

    up: Tensor  # (b, m, k) of the dtype of the factors
    down: Tensor  # (b, k, n) likewise
    spectrum: Tensor  # (b, min(m, n, r)) float64, descending


def factored(left: Tensor, right: Tensor, *, single: bool = False) -> Factored:
    """Cast to float64 and form both Gram matrices; left is (b, m, r), right is (b, r, n).

    With `single`, for factors of 16 bits, products are made in float32.
    """
    dtype = torch.float32 if single else torch.float64
    left, right = left.to(dtype), right.to(dtype)
    return Factored(left, right, (left.mT @ left).double(), (right @ right.mT).double())


def is_finite(f: Factored) -> Tensor:
    """Which members hold no NaN or infinity, as a (b,) bool tensor; a Gram diagonal cannot hide one."""
    return torch.isfinite(f.left_gram.diagonal(dim1=-2, dim2=-1).sum(-1)) & torch.isfinite(
        f.right_gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    )


def fits_single(f: Factored) -> bool:
    """Whether sums of squares that were made in float32 neither overflowed nor lost what it cannot hold."""
    sums = torch.cat([f.left_gram.diagonal(dim1=-2, dim2=-1), f.right_gram.diagonal(dim1=-2, dim2=-1)], dim=-1)
    return bool(((sums == 0) | ((sums > MIN_SUM_SINGLE) & torch.isfinite(sums))).all())


def _cholesky(gram: Tensor, *, single: bool = False) -> tuple[Tensor, Tensor]:
    """The lower factor and, per member, whether it can be trusted."""
    lower, info = torch.linalg.cholesky_ex(gram)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    least = MIN_PIVOT_SINGLE if single else MIN_PIVOT
    sound = (info == 0) & (pivots > least * gram.diagonal(dim1=-2, dim2=-1)).all(-1)
    return lower, sound


def singular_values(f: Factored) -> Tensor:
    """All min(m, n, r) singular values, descending, as a (b, min(m, n, r)) float64 tensor."""
    p, p_sound = _cholesky(f.left_gram, single=f.is_single)
    q, q_sound = _cholesky(f.right_gram, single=f.is_single)
    sound = p_sound & q_sound
    count = min(f.left.shape[1], f.left.shape[2], f.right.shape[2])
    if bool(sound.all()):
        return torch.linalg.svdvals(p.mT @ q)[:, :count]
    out = f.left_gram.new_empty(f.left.shape[0], count)
    if bool(sound.any()):
        out[sound] = torch.linalg.svdvals(p[sound].mT @ q[sound])[:, :count]
    out[~sound] = torch.linalg.svdvals(_qr_core(f.left[~sound].double(), f.right[~sound].double())[1])[:, :count]
    return out


def balanced_factors(f: Factored, rank: int) -> Balanced:
    """The Eckart-Young optimum of rank `rank` (at most min(m, n, r)), with deterministic signs.

    The entry of largest magnitude of each column of `up` is positive (the first such, where several tie).
    """
    p, p_sound = _cholesky(f.left_gram, single=f.is_single)
    q, q_sound = _cholesky(f.right_gram, single=f.is_single)
    sound = p_sound & q_sound
    if bool(sound.all()):
        best = _by_cholesky(f.left, f.right, p, q, rank)
    elif not bool(sound.any()):
        best = _with_care(f, sound, rank)
    else:
        parts = _by_cholesky(f.left[sound], f.right[sound], p[sound], q[sound], rank), _with_care(f, sound, rank)
        best = tuple(_interleaved(sound, ours, rest) for ours, rest in zip(*parts, strict=True))  # type: ignore[assignment]
    up, down, spectrum = best
    signs = column_signs(up)
    return Balanced(up * signs, down * signs.mT, spectrum)


def _with_care(f: Factored, sound: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The members that are not sound, in double precision or, if they are already, by QR."""
    if not f.is_single:
        return _by_qr(f.left[~sound], f.right[~sound], rank)
    best = balanced_factors(f.members(~sound), rank)
    return best.up.float(), best.down.float(), best.spectrum


def _interleaved(chosen: Tensor, ours: Tensor, rest: Tensor) -> Tensor:
    out = ours.new_empty(chosen.shape[0], *ours.shape[1:])
    out[chosen], out[~chosen] = ours, rest
    return out


def column_signs(u: Tensor) -> Tensor:
    """(..., 1, k) of +-1 that make the largest entry of each column positive; +1 for a zero column."""
    peak = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True))
    return torch.where(peak < 0, -1.0, 1.0).to(u.dtype)


def _by_cholesky(left: Tensor, right: Tensor, p: Tensor, q: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(p.mT @ q)
    inverse_root = s[:, :rank].rsqrt().unsqueeze(-1)  # sound factors have full rank: no zero here
    up = (((vt[:, :rank] * inverse_root) @ q.mT).to(left.dtype) @ left.mT).mT  # twice as fast as left @ (...)
    down = ((u[:, :, :rank] * inverse_root.mT).mT @ p.mT).to(right.dtype) @ right
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

    From Gram matrices, unless their terms cancel: members whose result is within rounding of the terms are done again,
    in double precision and at last through QR.
    """
    up, down = up.to(f.left.dtype), down.to(f.left.dtype)
    norms = f.left_gram * f.right_gram
    crosses = (up.mT @ f.left).mT.double() * (f.right @ down.mT).double()
    own = ((up.mT @ up).double() * (down @ down.mT).double()).sum((-2, -1))
    norm = norms.sum((-2, -1))
    distance = norm - 2 * crosses.sum((-2, -1)) + own
    terms = norms.abs().sum((-2, -1))  # what rounding is relative to; far above the norm for badly scaled factors
    least = CANCELLATION_SINGLE if f.is_single else CANCELLATION
    lost = ~(norm > least * terms)
    unresolved = ~(distance > least * (terms + 2 * crosses.abs().sum((-2, -1)) + own))
    if f.is_single:
        again = lost | unresolved
        if bool(again.any()):
            distance[again], norm[again] = squared_distance(f.members(again), up[again], down[again])
        return distance, norm
    if bool(lost.any()):
        norm[lost] = _qr_core(f.left[lost], f.right[lost])[1].square().sum((-2, -1))
    if bool(unresolved.any()):
        lefts = torch.cat([f.left[unresolved], -up[unresolved]], dim=-1)
        rights = torch.cat([f.right[unresolved], down[unresolved]], dim=-2)
        distance[unresolved] = _qr_core(lefts, rights)[1].square().sum((-2, -1))
    return distance, norm
