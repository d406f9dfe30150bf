"""Checkpoints whose channels were put in another order, as S2FT leaves them: known by the rows that stayed the same.

S2FT (NeurIPS 2024) permutes heads and hidden channels so that the trained ones lie together, and saves the model so:
the same function as base + delta, and another matrix in every place. Matrices that it froze tell the order, as their
rows are those of the base; the rows and columns of the trained ones beside them follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SUSPICIOUS = 0.1  # of ||tuned - base|| / ||base||: training moves weights by less, permuting by about sqrt(2)


@dataclass(frozen=True)
class Order:
    """Where rows and columns of a tuned matrix lie in the base: row `k` of it is row `rows[k]` there."""

    rows: Tensor | None = None
    columns: Tensor | None = None

    def restored(self, tensor: Tensor) -> Tensor:
        """`tensor` in the order of the base."""
        if self.rows is not None:
            tensor = torch.empty_like(tensor).index_copy_(0, self.rows, tensor)
        if self.columns is not None:
            tensor = torch.empty_like(tensor).index_copy_(1, self.columns, tensor)
        return tensor


def matched_rows(before: Tensor, after: Tensor) -> Tensor | None:
    """The row of `before` that each row of `after` is to the bit; None where one is of none, or the order is the same.

    Of equal rows the first that is left counts.
    """
    if before.shape != after.shape or before.ndim != 2:
        return None
    places: dict[bytes, list[int]] = {}
    for i, row in enumerate(_rows(before.to(after.dtype))):
        places.setdefault(row, []).append(i)
    found = []
    for row in _rows(after):
        left = places.get(row)
        if not left:
            return None
        found.append(left.pop(0))
    return None if found == sorted(found) else torch.tensor(found)


def candidates(name: str, shape: tuple[int, ...], known: Mapping[str, Tensor]) -> list[Order]:
    """The orders that parameter `name` may have, given those of the rows of matrices by module path.

    Those of the modules beside it, for its rows or its columns where the sizes agree; for a bias, that of its module.
    """
    module, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return [Order(rows=known[module])] if module in known and len(known[module]) == shape[0] else []
    parent = module.rpartition(".")[0]
    beside = [order for other, order in known.items() if other.rpartition(".")[0] == parent]
    distinct = [o for i, o in enumerate(beside) if not any(torch.equal(o, earlier) for earlier in beside[:i])]
    rows = [Order(rows=order) for order in distinct if len(order) == shape[0]]
    columns = [Order(columns=order) for order in distinct if len(shape) == 2 and len(order) == shape[1]]
    return rows + columns


def _rows(tensor: Tensor) -> list[bytes]:
    whole = tensor.contiguous()
    width = whole.shape[1] * whole.element_size()
    data = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    return [data[i * width : (i + 1) * width] for i in range(len(whole))]
