"""N:M and block sparsity, entry by entry, with their places written bit by bit."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from family_examples.base import Example, f64, rand
from family_examples.sparse import as_bytes, told

from loratools.families import NM, BlockSparse
from loratools.families.base import Layout


def _nm(m: int, groups: int, keep: int, group: int, scale: float = 1.0, *, transposed: bool = False) -> Example:
    choices = list(combinations(range(group), keep))
    width = next(w for w in range(20) if 2**w >= len(choices))
    values, delta, bits = rand(keep, m, groups, keep), np.zeros((m, groups * group)), []
    for row in range(m):
        for at in range(groups):
            chosen = (5 * row + 3 * at) % len(choices)
            bits += [(chosen >> i) & 1 for i in range(width)]
            for place, value in zip(choices[chosen], f64(values)[row, at], strict=True):
                delta[row, at * group + place] = scale * value
    delta = delta.T if transposed else delta
    tensors = {"nm_values": values, "nm_patterns": torch.tensor(as_bytes(bits), dtype=torch.uint8)}
    return Example(NM, tensors, delta, scale=scale, layout=Layout(transposed=transposed), base=rand(3, *delta.shape))


def _blocks(m: int, n: int, side: int, blocks: list[int], scale: float = 1.0) -> Example:
    values, delta = rand(side, len(blocks), side, side), np.zeros((m, n))
    across = n // side
    for block, value in zip(blocks, f64(values), strict=True):
        i, j = block // across * side, block % across * side
        delta[i : i + side, j : j + side] = scale * value
    places = torch.tensor(told(blocks, m // side * across), dtype=torch.uint8)
    tensors = {"blocksparse_values": values, "blocksparse_places": places}
    return Example(BlockSparse, tensors, delta, scale=scale, base=rand(4, m, n))


EXAMPLES = {
    "two_of_four": _nm(5, 3, 2, 4),
    "one_of_four": _nm(3, 4, 1, 4, -0.5),
    "three_of_seven": _nm(4, 2, 3, 7, transposed=True),
    "eight_of_sixteen": _nm(2, 3, 8, 16, 2.0),
    "blocks": _blocks(12, 8, 4, [0, 3, 5]),
    "blocks_of_one": _blocks(7, 5, 1, [0, 34], -0.5),
    "many_blocks": _blocks(6, 8, 2, [1, 2, 3, 4, 5, 7, 8, 10, 11], 3.0),
}
