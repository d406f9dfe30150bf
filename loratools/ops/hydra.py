"""Hydra's parallel and sequential branches: as one LoRA, and what each of them does (arXiv 2309.06922)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError, naming
from loratools.families.base import base_matrix
from loratools.families.hydra import Hydra
from loratools.families.lora import cast_to
from loratools.linalg.basis import decomposed
from loratools.linalg.inner import cosine, frobenius
from loratools.operators import LowRank
from loratools.ops.spectra import base_tensor
from loratools.reports.hydra import HydraBranch, HydraReport, HydraTarget

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
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


def hydra_branches(adapter: Adapter, base: BaseWeights, *, top: int = 16) -> HydraReport:
    """How the delta of every Hydra target is shared out: general features, which the base reads too, and novel ones.

    Compared with the first `top` right singular vectors of each base weight, which costs its SVD. UsageError where no
    target is a Hydra, or `top` is below 1.
    """
    if top < 1:
        raise UsageError(f"top {top} is below 1")
    found = {}
    for target, entry in adapter.entries.items():
        update = entry.read() if entry.family is Hydra else None
        if not isinstance(update, Hydra):
            continue
        weight = base_tensor(adapter, target, entry, base)
        with naming(target):
            branches = update.branches(weight)
        leading = decomposed(base_matrix("Hydra", weight, update.layout)).vt[:top]
        one, other = branches["parallel"], branches["sequential"]
        found[target] = HydraTarget(
            None if one is None else _branch(one, leading),
            None if other is None else _branch(other, leading),
            frobenius(update.operator(weight)),
            None if one is None or other is None else cosine(one, other),
        )
    if not found:
        raise UsageError("no target of the adapter is a Hydra")
    return HydraReport(top, found)


def _branch(branch: LowRank, leading: Tensor) -> HydraBranch:
    norm = frobenius(branch)
    seen = LowRank(branch.left, branch.right @ leading.T, branch.scale)
    rows = torch.linalg.qr(branch.right.T)[0]
    cosines = torch.linalg.svdvals(leading @ rows).clamp(max=1.0)
    return HydraBranch(branch.rank, norm, (frobenius(seen) / norm) ** 2 if norm else 0.0, tuple(cosines.tolist()))
