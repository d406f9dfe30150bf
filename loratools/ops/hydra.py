"""Hydra's parallel and sequential branches as one LoRA (arXiv 2309.06922)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import base_matrix
from loratools.families.lora import cast_to
from loratools.operators import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.families.lora import LoRA


def hydra(parallel: LoRA, sequential: LoRA, base: Tensor, bias: Tensor | None = None) -> LoRA:
    """The LoRA of rank r_p + r_s that adds `parallel(x) + sequential(base x + bias)` to the base's output.

    parallel (m, n) reads the input, sequential (m, m) the output of the base weight, which is in its own layout:
    delta = P + S W, and the bias changes by S bias and by the biases of both branches. Scale 1, in the dtypes of
    `parallel`. AdapterError where shapes do not chain.
    """
    p, s, weight = parallel.operator(), sequential.operator(), base_matrix("Hydra", base, parallel.layout)
    if not isinstance(p, LowRank) or not isinstance(s, LowRank):
        raise AdapterError("the branches of Hydra are plain factors, not experts or grouped convolutions")
    m, n = p.shape
    if tuple(weight.shape) != (m, n) or s.shape != (m, m):
        raise AdapterError(
            f"a parallel branch of {p.shape} needs a base of the same shape and a sequential branch of {(m, m)}; "
            f"they are {tuple(weight.shape)} and {s.shape}"
        )
    left = torch.cat([p.left.double() * p.scale, s.left.double() * s.scale], dim=1)  # (m, r_p + r_s)
    right = torch.cat([p.right.double(), s.right.double() @ weight])  # (r_p + r_s, n)
    folded = replace(parallel, up_bias=None).fit(LowRank(left, right), scale=1.0)
    changes = [b.double() for b in (parallel.bias_delta(), sequential.bias_delta()) if b is not None]
    if bias is not None:
        changes.append(s.to(torch.float64).matmat(bias.double().reshape(m, 1)).flatten())
    if not changes:
        return folded
    return replace(folded, up_bias=cast_to(sum(changes[1:], start=changes[0]), folded.up.dtype))
