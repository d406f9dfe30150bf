"""Several products at once: matrices that several operators share are read from memory once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.operators import Dense, Operator, Sum

if TYPE_CHECKING:
    from torch import Tensor

_PAD = 16  # products with a multiple of so many columns are faster than with fewer


def products(pairs: Sequence[tuple[Operator, Tensor]]) -> list[Tensor]:
    """op @ x for each pair; a product with few columns takes about as long as reading the matrix, however many."""
    found = [_rest(op, x) for op, x in pairs]
    shared: dict[tuple[object, ...], list[int]] = {}
    for i, (op, _) in enumerate(pairs):
        for matrix in _dense_terms(op):
            shared.setdefault((matrix.data_ptr(), matrix.shape, matrix.stride()), []).append(i)
    for members in shared.values():
        matrix = next(m for m in _dense_terms(pairs[members[0]][0]))
        widths = [pairs[i][1].shape[1] for i in members]
        together = torch.cat([pairs[i][1] for i in members], dim=1)
        whole = matrix @ torch.nn.functional.pad(together, (0, -together.shape[1] % _PAD))
        for i, part in zip(members, whole[:, : sum(widths)].split(widths, dim=1), strict=True):
            rest = found[i]
            found[i] = part if rest is None else rest + part
    return [x for x in found if x is not None]


def _terms(op: Operator) -> Iterable[Operator]:
    return op.terms if isinstance(op, Sum) else (op,)


def _dense_terms(op: Operator) -> list[Tensor]:
    return [term.matrix for term in _terms(op) if isinstance(term, Dense)]


def _rest(op: Operator, x: Tensor) -> Tensor | None:
    others = [term.matmat(x) for term in _terms(op) if not isinstance(term, Dense)]
    return sum(others[1:], start=others[0]) if others else None
