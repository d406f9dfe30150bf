"""LoHa and LoKr, whole and factored, with and without Tucker cores."""

from __future__ import annotations

import numpy as np
from family_examples.base import Example, f64, rand

from loratools.families import LoHa, LoKr
from loratools.families.base import Layout


def loha() -> dict[str, Example]:
    a1, b1, a2, b2 = rand(0, 7, 2), rand(1, 2, 9), rand(2, 7, 2), rand(3, 2, 9)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    plain = 0.5 * (f64(a1) @ f64(b1)) * (f64(a2) @ f64(b2))
    wide = [rand(4 + i, *shape) for i, shape in enumerate([(5, 4), (4, 6), (5, 4), (4, 6)])]
    dense = -1.5 * (f64(wide[0]) @ f64(wide[1])) * (f64(wide[2]) @ f64(wide[3]))
    t1, t2, wa1, wb1, wa2, wb2 = (
        rand(8 + i, *shape) for i, shape in enumerate([(2, 2, 3, 3), (2, 2, 3, 3), (2, 6), (2, 5), (2, 6), (2, 5)])
    )
    tucker = {"hada_t1": t1, "hada_t2": t2, "hada_w1_a": wa1, "hada_w1_b": wb1, "hada_w2_a": wa2, "hada_w2_b": wb2}
    factors = [np.einsum("ijkl,jr,ip->prkl", f64(t), f64(b), f64(a)) for t, b, a in ((t1, wb1, wa1), (t2, wb2, wa2))]
    return {
        "loha": Example(LoHa, dict(zip(names, (a1, b1, a2, b2), strict=True)), plain, 0.5),
        "loha_of_conv1d": Example(
            LoHa, dict(zip(names, (a1, b1, a2, b2), strict=True)), plain.T, 0.5, Layout(transposed=True)
        ),
        "loha_full_rank": Example(LoHa, dict(zip(names, wide, strict=True)), dense, -1.5),
        "loha_tucker": Example(LoHa, tucker, 2.0 * factors[0] * factors[1], 2.0),
    }


def lokr() -> dict[str, Example]:
    w1, w2, a, b = rand(20, 2, 3), rand(21, 4, 5), rand(22, 4, 2), rand(23, 2, 5)
    w1a, w1b, kernel = rand(24, 2, 1), rand(25, 1, 3), rand(26, 4, 5, 3, 3)
    t2, ta, tb = rand(27, 2, 2, 3, 3), rand(28, 2, 4), rand(29, 2, 5)
    core = np.einsum("ijkl,ip,jr->prkl", f64(t2), f64(ta), f64(tb))

    def conv(second: np.ndarray) -> np.ndarray:
        return np.stack([np.stack([np.kron(f64(w1), second[:, :, k, m]) for m in range(3)], -1) for k in range(3)], -2)

    return {
        "lokr_whole": Example(LoKr, {"lokr_w1": w1, "lokr_w2": w2}, np.kron(f64(w1), f64(w2))),
        "lokr": Example(
            LoKr, {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, 0.5 * np.kron(f64(w1), f64(a) @ f64(b)), 0.5
        ),
        "lokr_both": Example(
            LoKr,
            {"lokr_w1_a": w1a, "lokr_w1_b": w1b, "lokr_w2_a": a, "lokr_w2_b": b},
            -2.0 * np.kron(f64(w1a) @ f64(w1b), f64(a) @ f64(b)),
            -2.0,
        ),
        "lokr_of_conv1d": Example(
            LoKr, {"lokr_w1": w1, "lokr_w2": w2}, np.kron(f64(w1), f64(w2)).T, 1.0, Layout(transposed=True)
        ),
        "lokr_conv": Example(LoKr, {"lokr_w1": w1, "lokr_w2": kernel}, conv(f64(kernel))),
        "lokr_tucker": Example(
            LoKr, {"lokr_w1": w1, "lokr_t2": t2, "lokr_w2_a": ta, "lokr_w2_b": tb}, 0.5 * conv(core), 0.5
        ),
    }


EXAMPLES = loha() | lokr()
