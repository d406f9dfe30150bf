"""Training one LoRA that serves at many ranks: its first r components are an adapter of their own.

Three objectives on the same factors, with B_r and A_r the first r columns and rows:

* lora: s B A, of the whole rank alone;
* dylora: s_r B_r A_r with a rank drawn for each step (DyLoRA, arXiv 2210.07558), all of whose components learn;
* matryoshka: the sum of s_r B_r A_r over all ranks at once, which is B P A with a diagonal P (MatryoshkaLoRA, arXiv
  2605.07850). P is for training alone: what is saved, and cut, is B_r A_r with the scale of its rank, unless
  `keep_diagonal` makes the trained B P A of it first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from loratools._lazy import torch
from loratools.errors import UsageError
from loratools.reports.inspect import doubling
from loratools.training.anneal import lora_layers, no_lora

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Objective = Literal["lora", "dylora", "matryoshka"]
Scaling = Literal["keep", "rank", "sqrt"]  # s_r falls with r not at all, as alpha / r, or as alpha / sqrt(r)


def diagonal(rank: int, ranks: Sequence[int], scaling: Scaling = "keep") -> list[float]:
    """P of MatryoshkaLoRA over the scale of the whole: at place i the sum of s_r / s over trained ranks r > i."""
    _check(rank, ranks)
    return [sum(_share(r, rank, scaling) for r in ranks if r > i) for i in range(rank)]


@contextmanager
def nested(
    model: Module,
    objective: Objective,
    ranks: Sequence[int] | None = None,
    *,
    scaling: Scaling = "keep",
    seed: int = 0,
    adapter: str = "default",
) -> Iterator[Callable[[], None]]:
    """Within the block the LoRA layers of a PEFT model compute this objective; yields what to call before each step.

    `ranks` are 1, 2, 4, ... up to the rank of the adapter, unless given. The scale of the whole rank is the layer's
    own; `scaling` tells that of the others, and how to cut afterwards: `loratools truncate --nested keep`, `--nested
    dylora` for "rank" (DyLoRA's own), or `--nested matryoshka --scaling sqrt` with alpha 1 and use_rslora for "sqrt"
    (the default of MatryoshkaLoRA's script). UsageError for ranks that the adapter does not have, layers of several, or
    ones that never call their first factor.
    """
    layers, rank, chosen = _layers(model, ranks, adapter)
    draws = random.Random(seed)
    weights: list[Tensor] = [torch.zeros(rank)]

    def begin_step() -> None:
        if objective == "matryoshka":
            weights[0] = torch.tensor(diagonal(rank, chosen, scaling))
            return
        r = rank if objective == "lora" else draws.choice(chosen)
        weights[0] = _share(r, rank, scaling) * (torch.arange(rank) < r)

    def weighted(module: Module, inputs: Any, output: Tensor) -> Tensor:
        behind = len(getattr(module, "kernel_size", ()))  # axes that follow the channels of a convolution
        return output * weights[0].to(output).reshape(-1, *[1] * behind)

    begin_step()
    handles = [layer.lora_A[adapter].register_forward_hook(weighted) for layer in layers]
    try:
        yield begin_step
    finally:
        for handle in handles:
            handle.remove()


def keep_diagonal(
    model: Module, ranks: Sequence[int] | None = None, *, scaling: Scaling = "keep", adapter: str = "default"
) -> None:
    """Multiply MatryoshkaLoRA's P into the factors A, in place, once training is over: B P A is what was trained.

    `ranks` and `scaling` as `nested` was given them, which raises the same errors. The whole rank then computes what it
    was trained to; the first components are cut with its scale, `loratools truncate --nested keep`. The authors leave P
    out.
    """
    layers, rank, chosen = _layers(model, ranks, adapter)
    weights = torch.tensor(diagonal(rank, chosen, scaling))
    with torch.no_grad():
        for layer in layers:
            down = layer.lora_A[adapter].weight
            down.mul_(weights.to(down).reshape(-1, *[1] * (down.ndim - 1)))


def _layers(model: Module, ranks: Sequence[int] | None, adapter: str) -> tuple[list[Any], int, Sequence[int]]:
    """The LoRA layers, the rank of all of them, and the ranks that are trained."""
    layers = [layer for _, layer in lora_layers(model, adapter)]
    if not layers:
        raise no_lora(adapter)
    held = {layer.r[adapter] for layer in layers}
    if len(held) != 1:
        raise UsageError(f"the model has LoRA layers of ranks {sorted(held)}; nested training needs one rank for all")
    (rank,) = held
    if unfit := sorted({type(layer).__name__ for layer in layers if not _calls_first_factor(layer, adapter)}):
        raise UsageError(
            f"the model has a LoRA at layers of PEFT's {', '.join(unfit)}; nested training is for linear layers and "
            "convolutions"
        )
    chosen = doubling(rank) if ranks is None else sorted(set(ranks))
    _check(rank, chosen)
    return layers, rank, chosen


def _calls_first_factor(layer: Any, adapter: str) -> bool:
    """Whether `lora_A` is a module that runs: not in embeddings, nor where PEFT multiplies factors into a weight."""
    return adapter in layer.lora_A and type(layer).__name__ not in ("MultiheadAttention", "ParamWrapper")


def _share(r: int, rank: int, scaling: Scaling) -> float:
    """s_r by the scale of the whole."""
    return {"keep": 1.0, "rank": rank / r, "sqrt": math.sqrt(rank / r)}[scaling]


def _check(rank: int, ranks: Sequence[int]) -> None:
    if not ranks or not all(1 <= r <= rank for r in ranks):
        raise UsageError(f"ranks {list(ranks)}: give some between 1 and {rank}, the rank of the adapter")
