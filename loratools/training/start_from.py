"""A fresh LoRA or DoRA of a PEFT model that begins with given deltas instead of none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import AdapterError, naming
from loratools.linalg.svd import truncate
from loratools.operators import LowRank
from loratools.training.anneal import factors_of, lora_layers

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter

_EMPTY = 1e-7  # of the largest singular value: below, a component holds nothing


def start_from(model: Any, adapter: Adapter, *, adapter_name: str = "default") -> tuple[str, ...]:
    """Let the layers of a PeftModel begin with the best approximation of their rank of `adapter`'s deltas, in place.

    Factors are balanced, U sqrt(S / scale) and sqrt(S / scale) V^T, so that with the layer's own scale the delta is
    what it was. Components that the delta has not keep their fresh start, a direction below and nothing above; so do
    layers that `adapter` says nothing of. Magnitudes of DoRA become the row norms of weight and delta, so that these
    are what the layer computes with. Returns the targets that the model has no layer for. AdapterError, before
    anything is changed, for deltas that do not fit.
    """
    every = lora_layers(model.get_base_model(), adapter_name)
    layers = {name: layer for name, layer in every if adapter_name in layer.lora_A}  # tables of words are other layers
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for target, update in adapter.items():
        if target not in layers:
            continue
        down, up = factors_of(layers[target], adapter_name)
        with naming(target):
            op = update.operator()
            if op.shape != (len(up), down.shape[1]):
                raise AdapterError(f"a delta of {op.shape} does not fit a layer of {(len(up), down.shape[1])}")
            made[target] = _factors(op, len(down), layers[target].scaling[adapter_name])
    with torch.no_grad():
        for target, (left, right) in made.items():
            down, up = factors_of(layers[target], adapter_name)
            up.zero_()
            up[:, : left.shape[1]] = left.to(up)
            down[: len(right)] = right.to(down)
            if adapter_name in (getattr(layers[target], "lora_magnitude_vector", None) or ()):
                _set_magnitude(layers[target], adapter_name)
    return tuple(target for target in adapter if target not in layers)


def _factors(op: Any, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(out, k) and (k, in) float64 of the components that hold something, at most `rank`."""
    most = min(rank, *op.shape, *((op.rank,) if isinstance(op, LowRank) else ()))
    best = truncate(op, most, method="exact")
    assert isinstance(best.operator, LowRank)  # as `op` is one block
    s = best.spectra[0][:most]
    k = int((s > _EMPTY * s[0]).sum())  # strict: of an all-zero delta nothing is left
    root = scale**0.5
    return best.operator.left[:, :k] / root, best.operator.right[:k] / root


def _set_magnitude(layer: Any, adapter_name: str) -> None:
    """||W + s B A|| of each row, without the product of B and A."""
    down, up = (one.double() for one in factors_of(layer, adapter_name))
    up = up * layer.scaling[adapter_name]
    weight = layer.get_base_layer().weight.detach().double()
    weight = weight.T if layer.fan_in_fan_out else weight
    square = weight.square().sum(1) + 2 * (weight @ down.T * up).sum(1) + (up @ (down @ down.T) * up).sum(1)
    magnitude = layer.lora_magnitude_vector[adapter_name].weight
    magnitude.copy_(square.clamp(min=0).sqrt().reshape(magnitude.shape))
