"""Hydra's forward pass against the LoRA that it folds into."""

from __future__ import annotations

import pytest
import torch

from loratools import hydra
from loratools.errors import AdapterError
from loratools.families.base import Layout
from loratools.families.lora import LoRA

GEN = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GEN, dtype=torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_fold_gives_the_branches_outputs(transposed: bool) -> None:
    m, n, r_p, r_s, s = 7, 5, 3, 2, 0.5
    d_p, u_p, c_p, d_s, u_s, c_s = draw(r_p, n), draw(m, r_p), draw(m), draw(r_s, m), draw(m, r_s), draw(m)
    weight, bias, x = draw(m, n), draw(m), draw(n)
    layout = Layout(transposed=transposed)
    folded = hydra(
        LoRA(d_p, u_p, s, layout, up_bias=c_p),
        LoRA(d_s, u_s, s, up_bias=c_s),
        weight.T if transposed else weight,
        bias,
    )
    y = weight @ x + bias
    branches = s * (u_p @ (d_p @ x) + c_p) + s * (u_s @ (d_s @ y) + c_s)
    assert folded.down.shape[0] == r_p + r_s
    change = folded.bias_delta()
    assert change is not None
    ours = folded.operator().dense() @ x + change.double()
    assert torch.allclose(ours, branches, rtol=1e-6, atol=1e-6)


def test_without_biases_it_is_exact_and_shapes_are_checked() -> None:
    p, s, weight = LoRA(draw(3, 5), draw(7, 3), 2.0), LoRA(draw(2, 7), draw(7, 2), 1.5), draw(7, 5)
    exact = 2.0 * p.up @ p.down + 1.5 * s.up @ s.down @ weight
    folded = hydra(p, s, weight)
    assert folded.up_bias is None
    assert torch.allclose(folded.operator().dense(), exact, rtol=1e-13, atol=1e-13)
    with pytest.raises(AdapterError, match="needs a base of the same shape"):
        hydra(p, p, weight)
