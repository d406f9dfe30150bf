"""Squeezing a LoRA while it is trained: fewer ranks, in stages, until the wanted one is left (LoRA-Squeeze, in-tuning).

The paper (arXiv 2602.10993) tells no schedule; geometric ranks at even distances are a reconstruction. At each stage
the factors become the best ones of the next rank, U sqrt(S) and sqrt(S) V^T of their product, with the scale kept. New
factors are B M and N A with small matrices, so what the optimizer knows can go along: a gradient by the factors, and
with it the first moments of Adam, becomes exactly g_B N^T and M^T g_A where nothing was cut off; the second moments are
carried by the squared entries, as if the entries of a gradient did not depend on one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

State = Literal["project", "reset"]

_FIRST = ("exp_avg", "momentum_buffer")  # sums of gradients
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")  # sums of their squares
_PLAIN = ("NoneType", "Dora", "ALora")  # PEFT's variants whose delta, before a magnitude or a mask, is B A
_EMPTY = 1e-7  # of the largest singular value: below, a component holds nothing


@dataclass(frozen=True)
class Stage:
    """One squeeze: after which step, to which rank, and the relative error of all deltas."""

    step: int
    rank: int
    relative_error: float


def annealed_ranks(start: int, to: int, stages: int) -> tuple[int, ...]:
    """The rank after each stage, from `start` to `to` in even ratios; stages that would change nothing fall out."""
    if not 1 <= to <= start or stages < 1:
        raise UsageError(f"from rank {start} to {to} in {stages} stages: the rank must fall, in one stage at least")
    ranks = [round(start * (to / start) ** (j / stages)) for j in range(1, stages + 1)]
    return tuple(rank for before, rank in zip([start, *ranks], ranks, strict=False) if rank < before)


def annealing_steps(steps: int, stages: int) -> tuple[int, ...]:
    """After which of `steps` steps each stage comes; after the last one as many follow as came before the first."""
    if steps <= stages:
        raise UsageError(f"{steps} steps are too few for {stages} squeezes")
    return tuple(steps * j // (stages + 1) for j in range(1, stages + 1))


def squeeze_model(
    model: Module, rank: int, optimizer: Any = None, *, state: State = "project", adapter: str = "default"
) -> float:
    """Make the LoRA layers of a PEFT model ones of `rank`, in place, and return the relative error of all deltas.

    The factors become new parameters, in the model and in `optimizer`, which goes on with them; what it knows of them
    is projected or reset; gradients that were gathered are projected. A list of parameters that is held elsewhere has
    to be made anew. The scale of each layer stays, and so does the magnitude of DoRA. Layers of that rank or less are
    left alone. Before anything is changed: AdapterError for weights that are not finite, UsageError for what is no
    product of two factors of one rank.
    """
    config = annealable_config(model, adapter)
    for name, layer in lora_layers(model, adapter):
        if not all(bool(torch.isfinite(factor).all()) for factor in factors_of(layer, adapter)):
            raise AdapterError(f"{name}: holds NaN or infinity; lower the learning rate")
    lost = whole = 0.0
    # From outside in: each wrapper of an optimizer (such as Accelerate's) holds the next.
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    with torch.no_grad():
        for name, layer in lora_layers(model, adapter):
            down, up = factors_of(layer, adapter)
            if len(down) <= rank:
                continue
            made = _squeezed(down, up, rank)
            square = (layer.scaling[adapter]) ** 2
            lost, whole = lost + square * made.lost, whole + square * made.whole
            _put(layer, "A", adapter, _replaced(down, made.down, made.turn_up.T, optimizer, state, axis=0))
            _put(layer, "B", adapter, _replaced(up, made.up, made.turn_down, optimizer, state, axis=1))
            _declare(layer, adapter, rank, config.use_rslora)
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    if rank < config.r:
        config.r = rank
        config.lora_alpha = _number(scale * (math.sqrt(rank) if config.use_rslora else rank))
    return math.sqrt(lost / whole) if whole else 0.0


def lora_layers(model: Module, adapter: str = "default") -> Iterator[tuple[str, Any]]:
    """The LoRA layers of a PEFT model that hold an adapter of that name, by module name."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            yield name, module


def no_lora(adapter: str) -> UsageError:
    """The error for a model without a LoRA of that name."""
    return UsageError(f"the model has no LoRA called {adapter!r}; make it with peft.get_peft_model")


def annealable_config(model: Module, adapter: str = "default") -> Any:
    """The config of a LoRA that can be annealed; UsageError where the model has none."""
    config: Any = getattr(model, "peft_config", {}).get(adapter)
    layers = list(lora_layers(model, adapter))
    if config is None or not layers:
        raise no_lora(adapter)
    if config.peft_type != "LORA":
        raise UsageError(f"{adapter!r} is an adapter of another method; only a LoRA can be annealed")
    if config.rank_pattern or config.alpha_pattern:
        raise UsageError("rank_pattern and alpha_pattern cannot be annealed; train with one rank and one alpha")
    if getattr(config, "target_modules_to_tie", None):
        raise UsageError("factors that two layers share cannot be annealed; train without ensure_weight_tying")
    for name, layer in layers:
        if adapter in layer.merged_adapters:
            raise UsageError(f"{name}: is merged into its weights; call unmerge_adapter() first")
        if why := _unfit(layer, adapter):
            raise UsageError(f"{name}: {why} cannot be annealed; leave that out of the LoRA")
    return config


def _unfit(layer: Any, adapter: str) -> str:
    """What is no product of two factors of one rank; empty where it is."""
    if getattr(layer, "num_experts", 1) > 1:
        return "a parameter with an expert in each slice"
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        return "a convolution in groups"
    variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__  # older PEFT has none but DoRA
    return "" if variant.startswith(_PLAIN) else variant


def factors_of(layer: Any, adapter: str) -> tuple[Parameter, Parameter]:
    """The parameters A and B of a LoRA layer, or of one of an embedding."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


@dataclass(frozen=True, eq=False)
class _Squeezed:
    down: Tensor  # (k, n) float64
    up: Tensor  # (m, k)
    turn_down: Tensor  # N, (k, r): down = N A
    turn_up: Tensor  # M, (r, k): up = B M
    lost: float  # squared
    whole: float


def _squeezed(down: Tensor, up: Tensor, rank: int) -> _Squeezed:
    A, B = down.detach().flatten(1).double(), up.detach().flatten(1).double()
    Qa, Ra = torch.linalg.qr(A.T)
    Qb, Rb = torch.linalg.qr(B)
    U, S, Vt = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    if (short := rank - len(S)) > 0:  # a matrix with fewer rows or columns than that: the rest is empty
        S, U = (torch.nn.functional.pad(x, (0, short)) for x in (S, U))
        Vt = torch.cat([Vt] * -(-rank // len(Vt)))
    kept = S[:rank]
    live = kept > _EMPTY * S[0].clamp_min(torch.finfo(torch.float64).tiny)
    # A component without anything in it starts afresh as LoRA does: nothing above, a direction below.
    fresh = float(kept[live].mean().sqrt()) if bool(live.any()) else float(A.norm() / math.sqrt(len(A)))
    above = torch.where(live, kept.sqrt(), 0.0)
    below = torch.where(live, kept.sqrt(), fresh)
    turn_down = (below[:, None] * Vt[:rank]) @ torch.linalg.pinv(Ra.T)
    turn_up = torch.linalg.pinv(Rb) @ (U[:, :rank] * above)
    return _Squeezed(
        (below[:, None] * Vt[:rank]) @ Qa.T,
        Qb @ (U[:, :rank] * above),
        turn_down,
        turn_up,
        float(S[rank:].square().sum()),
        float(S.square().sum()),
    )


def _put(layer: Any, which: Literal["A", "B"], adapter: str, parameter: Parameter) -> None:
    if adapter in layer.lora_A:
        getattr(layer, f"lora_{which}")[adapter].weight = parameter
    else:
        getattr(layer, f"lora_embedding_{which}")[adapter] = parameter


def _replaced(before: Parameter, made: Tensor, carry: Tensor, optimizer: Any, state: State, *, axis: int) -> Parameter:
    """The new parameter, in the optimizer's place of the old one; `carry`, (k, r), turns a gradient along `axis`.

    Not a new value of the old one: where a loss of an earlier step is still held, autograd knows that by its shape.
    """
    shape = list(before.shape)
    shape[axis] = len(carry)
    after = torch.nn.Parameter(made.reshape(shape).to(before), requires_grad=before.requires_grad)
    if before.grad is not None:
        after.grad = _along(carry, before.grad, axis)
    if optimizer is None:
        return after
    for group in optimizer.param_groups:
        group["params"] = [after if parameter is before else parameter for parameter in group["params"]]
    known = optimizer.state.pop(before, None)
    if not known or state == "reset":
        return after
    names = {name for name, value in known.items() if torch.is_tensor(value) and value.ndim}
    if names <= {*_FIRST, *_SECOND}:
        for name in names:
            known[name] = _along(carry.square() if name in _SECOND else carry, known[name], axis)
        optimizer.state[after] = known
    return after


def _along(turn: Tensor, value: Tensor, axis: int) -> Tensor:
    """`turn` times the matrix whose rows lie along `axis` of `value`."""
    return torch.tensordot(turn.to(value.dtype), value, ([1], [axis])).movedim(0, axis).contiguous()


def _declare(layer: Any, adapter: str, rank: int, rslora: bool) -> None:
    """What the layer tells of its rank; the scale stays."""
    layer.r[adapter] = rank
    layer.lora_alpha[adapter] = _number(layer.scaling[adapter] * (math.sqrt(rank) if rslora else rank))
    if adapter not in layer.lora_A:
        return
    for module, names in (
        (layer.lora_A[adapter], ("out_features", "out_channels")),
        (layer.lora_B[adapter], ("in_features", "in_channels")),
    ):
        for name in names:
            if hasattr(module, name):
                setattr(module, name, rank)


def _number(value: float) -> float | int:
    """As configs hold it: whole numbers as such."""
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 * max(1.0, abs(value)) else value
