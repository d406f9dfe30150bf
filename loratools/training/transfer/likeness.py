"""How far two samples are from being of one distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def mean_discrepancy(x: Tensor, y: Tensor) -> float:
    """The squared maximum mean discrepancy of (rows, width) samples, without bias: about 0 for one distribution.

    Its kernel is Gaussian, as wide as the median distance of all rows.
    """
    both = torch.cat([x, y])
    squares = torch.cdist(both, both).square()
    n = len(x)
    width = squares[~torch.eye(len(both), dtype=torch.bool)].median().clamp(min=1e-12)
    kernel = torch.exp(-squares / width)
    a, b, c = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (a, b)]
    return float(within[0] + within[1] - 2 * c.mean())
