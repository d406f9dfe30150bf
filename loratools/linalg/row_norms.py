"""Row norms of base + low rank without forming the sum (Scaling DoRA, arXiv 2603.22276)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.operators import LowRank

# A squared norm below this share of its terms' magnitudes is the rest of a cancellation: that row is done densely.
CANCELLATION = 1e-6


def row_norms(base: Tensor, low: LowRank) -> Tensor:
    """||base_i + low_i|| for each row i, float64 of shape (m,), with m * r + r^2 numbers of intermediate storage.

    ||w + s b A||^2 = ||w||^2 + 2 s <b, A w> + s^2 b (A A^T) b^T.
    """
    left, right = low.left.double() * low.scale, low.right.double()  # (m, r), (r, n)
    squared = base.new_zeros(base.shape[0], dtype=torch.float64)
    cross = torch.zeros_like(left)
    step = max(1, 2**22 // max(1, base.shape[0]))
    for start in range(0, base.shape[1], step):
        part = base[:, start : start + step].double()
        squared += part.square().sum(1)
        cross += part @ right[:, start : start + step].T
    mixed = 2 * (cross * left).sum(1)
    own = ((left @ (right @ right.T)) * left).sum(1)
    total = squared + mixed + own
    lost = total < CANCELLATION * (squared + mixed.abs() + own)
    if bool(lost.any()):
        total[lost] = (base[lost].double() + left[lost] @ right).square().sum(1)
    return total.clamp(min=0.0).sqrt()
