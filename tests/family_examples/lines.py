"""PaCA and S2FT: columns put in the place of others, and rows or columns added."""

from __future__ import annotations

import numpy as np
import torch
from family_examples.base import Example, f64, rand

from loratools.families import S2FT, PaCA
from loratools.families.base import Layout


def _paca(m: int, n: int, which: list[int], scale: float, *, transposed: bool = False) -> Example:
    columns, base = rand(0, m, len(which)), rand(1, n, m) if transposed else rand(1, m, n)
    weight = f64(base).T if transposed else f64(base)
    after = weight.copy()
    for place, column in zip(which, f64(columns).T, strict=True):
        after[:, place] = scale * column
    delta = after - weight
    tensors = {"paca_w": columns, "paca_indices": torch.tensor(which)}
    return Example(
        PaCA, tensors, delta.T if transposed else delta, scale=scale, layout=Layout(transposed=transposed), base=base
    )


def _s2ft(m: int, n: int, which: list[int], axis: str, scale: float = 1.0) -> Example:
    values = rand(2, *((len(which), n) if axis == "rows" else (m, len(which))))
    delta = np.zeros((m, n))
    if axis == "rows":
        delta[which] = scale * f64(values)
    else:
        delta[:, which] = scale * f64(values)
    tensors = {"s2ft_values": values, f"s2ft_{axis}": torch.tensor(which, dtype=torch.int32)}
    return Example(S2FT, tensors, delta, scale=scale, base=rand(3, m, n))


def _kernel() -> Example:
    columns, base = rand(4, 5, 2), rand(5, 5, 3, 2, 2)
    after = f64(base).reshape(5, 12).copy()
    after[:, [7, 2]] = f64(columns)
    delta = after.reshape(5, 3, 2, 2) - f64(base)
    return Example(PaCA, {"paca_w": columns, "paca_indices": torch.tensor([7, 2])}, delta, base=base)


EXAMPLES = {
    "paca": _paca(7, 9, [8, 0, 4], 2.0),
    "paca_transposed": _paca(5, 8, [3], -0.5, transposed=True),
    "paca_convolution": _kernel(),
    "rows": _s2ft(7, 9, [0, 6], "rows"),
    "columns": _s2ft(8, 5, [4, 1, 0], "columns", -2.0),
}
