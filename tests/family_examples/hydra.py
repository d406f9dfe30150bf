"""Hydra: the branches' outputs on unit vectors, as the forward pass computes them."""

from __future__ import annotations

import numpy as np
import torch
from family_examples.base import Example, f64, rand

from loratools.families import Hydra
from loratools.families.base import Layout


def _example(
    m: int,
    n: int,
    ranks: tuple[int, int],
    scale: float,
    *,
    biases: bool = False,
    learnt: bool = False,
    transposed: bool = False,
) -> Example:
    weight, bias = rand(m, m, n), rand(m + 1, m)
    tensors = {}
    for index, (branch, inputs) in enumerate((("p", n), ("s", m))):
        if not ranks[index]:
            continue
        at, rank = f"hydra_{branch}_", ranks[index]
        tensors |= {f"{at}down": rand(10 + index, rank, inputs), f"{at}up": rand(20 + index, m, rank)}
        if biases:
            tensors |= {f"{at}down_bias": rand(30 + index, rank), f"{at}up_bias": rand(40 + index, m)}
        if learnt:
            tensors[f"{at}scale"] = torch.tensor([0.75 - index])
    held = {slot: f64(t) for slot, t in tensors.items()}

    def change(x: np.ndarray) -> np.ndarray:
        y = f64(weight) @ x + f64(bias)
        total = np.zeros(m)
        for branch, seen in (("p", x), ("s", y)):
            at = f"hydra_{branch}_"
            if f"{at}up" in held:
                inner = held[f"{at}down"] @ seen + held.get(f"{at}down_bias", 0.0)
                own = held[f"{at}scale"].item() if learnt else scale
                total += own * (held[f"{at}up"] @ inner + held.get(f"{at}up_bias", 0.0))
        return total

    offset = change(np.zeros(n))
    delta = np.stack([change(x) - offset for x in np.eye(n)], axis=1)
    changes_bias = biases or ranks[1] > 0
    base = weight.T.contiguous() if transposed else weight
    return Example(
        Hydra,
        tensors,
        delta.T if transposed else delta,
        scale,
        Layout(transposed=transposed),
        base=base,
        bias=bias,
        bias_delta=offset if changes_bias else None,
    )


EXAMPLES = {
    "both": _example(6, 5, (2, 3), 0.5),
    "biased": _example(5, 8, (1, 2), -2.0, biases=True),
    "learnt_scales": _example(4, 7, (2, 1), 1.0, biases=True, learnt=True),
    "parallel": _example(6, 5, (2, 0), 0.5),
    "sequential": _example(6, 5, (0, 2), 0.5),
    "transposed": _example(6, 5, (2, 1), 0.5, transposed=True),
}
