"""Orthogonal matrices from skew-symmetric ones, and products with block-diagonal ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def skew_size(count: int) -> int | None:
    """The size of the skew-symmetric matrix with `count` entries above its diagonal; None where there is none."""
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    return size if size * (size - 1) // 2 == count else None


def skew(upper: Tensor, size: int) -> Tensor:
    """Skew-symmetric (b, size, size) with the rows of `upper` (b, count) above the diagonals, row by row."""
    matrix = upper.new_zeros(upper.shape[0], size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    matrix[:, rows, columns] = upper
    return matrix - matrix.mT


def cayley(q: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1 of skew-symmetric Q (..., b, b)."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye + q, eye - q)  # both are functions of Q, which commute


def cayley_neumann(q: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q^2 + ... + Q^k of Q (..., b, b): the series of (I + Q)(I - Q)^-1, cut as PEFT cuts it.

    The last power k is terms - 1, but 3 for 3 terms, and there is only I for less than 2.
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    if terms < 2:
        return eye
    if terms == 2:
        return eye + 2 * q
    power = q @ q
    total = eye + 2 * q + 2 * power
    for _ in range(terms - 4):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def times_blocks(matrix: Tensor, blocks: Tensor) -> Tensor:
    """`matrix` (m, k b) @ block_diag(`blocks`), for blocks (k, b, b)."""
    count, size, _ = blocks.shape
    return torch.einsum("mkb,kbc->mkc", matrix.reshape(-1, count, size), blocks).flatten(1)


def reflections(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Factors C (n, r), U^T (r, n) with I + C U^T = the product of the reflections I - 2 u u^T of the unit columns u.

    In the order of the columns, the first one leftmost.
    """
    columns: list[Tensor] = []
    for k in range(vectors.shape[1]):
        image = vectors[:, k]
        if columns:
            image = image + torch.stack(columns, dim=1) @ (vectors[:, :k].T @ vectors[:, k])
        columns.append(-2 * image)
    return torch.stack(columns, dim=1), vectors.T
