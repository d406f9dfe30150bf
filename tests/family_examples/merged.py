"""LoRA of fused projections, block by block as loralib's grouped convolution computes it."""

from __future__ import annotations

import numpy as np
from family_examples.base import Example, f64, rand

from loratools.families import MergedLoRA
from loratools.families.base import Layout


def _of(blocks: tuple[tuple[int, bool], ...], rank: int, columns: int, seed: int) -> Example:
    sizes = [size for size, updated in blocks if updated]
    down, up = rand(seed, len(sizes) * rank, columns), rand(seed + 1, sum(sizes), rank)
    rows, taken, done = [], 0, 0
    for size, updated in blocks:
        if not updated:
            rows.append(np.zeros((size, columns)))
            continue
        own = f64(down)[done * rank : (done + 1) * rank]
        rows.append(0.7 * f64(up)[taken : taken + size] @ own)
        taken, done = taken + size, done + 1
    tensors = {"merged_down": down, "merged_up": up}
    return Example(MergedLoRA, tensors, np.concatenate(rows), 0.7, Layout(blocks=blocks))


def _transposed(example: Example) -> Example:
    layout = Layout(transposed=True, blocks=example.layout.blocks)
    return Example(MergedLoRA, example.tensors, example.delta.T, 0.7, layout)


EXAMPLES = {
    "merged_all": _of(((5, True), (5, True), (5, True)), 2, 7, 300),
    "merged_some": _of(((5, True), (5, False), (5, True)), 2, 7, 310),
    "merged_of_other_sizes": _of(((8, False), (3, True), (3, True)), 2, 9, 320),
    "merged_transposed": _transposed(_of(((5, False), (5, True)), 3, 6, 330)),
}
