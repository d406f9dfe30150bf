"""A few random numbers of a linear map, the same for whatever factors it is made of.

L^T D R with L (m, k) and R (n, k) of independent random signs. For two maps D and E of one key the mean of
<L^T D R, L^T E R> / k^2 over the signs is <D, E>; for maps of different keys it is 0, so that such numbers may be added
up over the targets of an adapter. One matrix of signs is shared by all maps of a size, with signs of its own for every
row and key: each L is then as random as if it were drawn alone, the errors of different keys are uncorrelated, for what
they have in common is the diagonal of L L^T, which does not vary, and what two keys add to each other's error is larger
by 1 + k / m and 1 + k / n alone.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.operators import BlockDiagonal, LowRank, Operator, Sum

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 32  # k


def projected(op: Operator, key: str, seed: int = 0) -> Tensor:
    """L^T op R / k as (k, k) float32: inner products of these estimate inner products of the maps.

    `key` names the map's place: only maps of one key, shape and seed are projected alike.
    """
    m, n = op.shape
    place = f"{seed} {m} {n} {key}"
    left = _signs(f"rows {place}", m).unsqueeze(1) * _shared(f"rows {seed}", m)
    right = _signs(f"columns {place}", n).unsqueeze(1) * _shared(f"columns {seed}", n)
    return _core(op, left, right) / SIDE


def _core(op: Operator, left: Tensor, right: Tensor) -> Tensor:
    """left^T op right, without the product of factors."""
    if isinstance(op, LowRank):
        return (left.T @ op.left.float()) @ (op.right.float() @ right) * op.scale
    if isinstance(op, Sum):
        return torch.stack([_core(term, left, right) for term in op.terms]).sum(0)
    if isinstance(op, BlockDiagonal):
        lefts = left.split([block.shape[0] for block in op.blocks])
        rights = right.split([block.shape[1] for block in op.blocks])
        return torch.stack([_core(*each) for each in zip(op.blocks, lefts, rights, strict=True)]).sum(0)
    return left.T @ op.to(torch.float32).matmat(right)


def _signs(text: str, count: int) -> Tensor:
    """`count` signs from the text, the same on every machine and with every version of every library."""
    drawn = bytearray(hashlib.shake_256(text.encode("utf-8", "surrogatepass")).digest(-(-count // 8)))
    bits = torch.frombuffer(drawn, dtype=torch.uint8).unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)
    return ((bits & 1).flatten()[:count].float() * 2).sub_(1)


@lru_cache(maxsize=16)
def _shared(text: str, size: int) -> Tensor:
    return _signs(text, size * SIDE).reshape(size, SIDE)
