"""Whole rows and columns of operators, and those that hold most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.entries import row_blocks
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor


def energies(op: Operator, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Squared norms of the rows (m,) and of the columns (n,), float64; each column counts by its weight's square."""
    rows = []
    columns = torch.zeros(op.shape[1], dtype=torch.float64, device=op.leaf.device)
    for _, block in row_blocks(op):
        squares = block.square() if weights is None else (block * weights).square()
        rows.append(squares.sum(1))
        columns += squares.sum(0)
    return torch.cat(rows), columns


def columns_of(op: Operator, which: Tensor) -> Tensor:
    """The columns of these numbers, (m, k) float64."""
    if isinstance(op, Dense):
        return op.matrix[:, which].double()
    if isinstance(op, LowRank):
        return op.left.double() @ op.right[:, which].double() * op.scale
    return op.to(torch.float64).matmat(units(which, op.shape[1]))


def units(which: Tensor, size: int) -> Tensor:
    """Unit vectors of these numbers as columns, (size, k) float64."""
    found = torch.zeros(size, len(which), dtype=torch.float64, device=which.device)
    found[which, torch.arange(len(which), device=which.device)] = 1.0
    return found
