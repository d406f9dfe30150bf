"""How far two operators share their directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def principal_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the principal angles between the column spaces of orthonormal a (m, p) and b (m, q), descending."""
    return torch.linalg.svdvals(a.T @ b).clamp(max=1.0)


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles, in [0, 1]: the share of the smaller space inside the larger."""
    count = min(a.shape[1], b.shape[1])
    return min(1.0, float((a.T @ b).square().sum()) / count) if count else 0.0
