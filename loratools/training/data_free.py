"""Statistics without data: of inputs that a norm leaves, its gain tells the size of each channel."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.ops.statistics import Statistics, fingerprint, weighed_targets

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights

_MODULE = re.compile(r"^(?P<layer>(?:.+\.)?\d+)\.(?:self_attn|mlp)\.(?P<leaf>\w+)$")
_READS_ATTENTION_NORM = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj"})
_READS_MLP_NORM = frozenset({"gate_proj", "up_proj", "gate_up_proj"})


def data_free_statistics(base: BaseWeights, adapter: Adapter) -> Statistics:
    """C = diag(g^2) with the gain g of the norm before a module, as if all channels that the norm leaves were alike.

    For models laid out as Llama is: queries, keys and values after `input_layernorm`; gate and up after
    `pre_feedforward_layernorm`, or else `post_attention_layernorm`. Every other target counts its channels alike.
    Raises AdapterError where the base has none of those norms.
    """
    moments: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    prints: dict[str, str] = {}
    found = False
    for target in weighed_targets(adapter):
        update = adapter[target]
        down = update.parameters()["down"].double()
        gain = None if update.layout.embedding else _gain(base, adapter, target, down.shape[1])
        found = found or gain is not None
        means[target] = torch.ones(down.shape[1], dtype=torch.float64) if gain is None else gain.square()
        moments[target] = (down * means[target]) @ down.T
        prints[target] = fingerprint(update)
    if not found:
        raise AdapterError(
            f"{base.source.path}: has no norm in front of {next(iter(moments))} or any other target; without --data "
            "only models laid out as Llama is are weighed"
        )
    return Statistics(moments, means, 0, prints)


def _gain(base: BaseWeights, adapter: Adapter, target: str, inputs: int) -> Tensor | None:
    """(n,) float64 gain of the norm whose output enters `target`; None where there is no such norm."""
    placement = adapter.format.place(target)
    match = _MODULE.match(placement.pieces[0].module.path) if placement else None
    if match is None:
        return None
    names = _norms(base, match["layer"], match["leaf"])
    name = next((n for n in names if base.name_of(n) is not None), None)
    if name is None:
        return None
    weight = base.find(name, (inputs,)).double()
    return weight + 1 if str(base.config.get("model_type", "")).startswith("gemma") else weight


def _norms(base: BaseWeights, layer: str, leaf: str) -> tuple[str, ...]:
    """Where the gain may be, the likeliest first."""
    if leaf in _READS_ATTENTION_NORM:
        return (f"{layer}.input_layernorm.weight",)
    if leaf not in _READS_MLP_NORM:
        return ()
    before, after = (f"{layer}.{side}_feedforward_layernorm.weight" for side in ("pre", "post"))
    if base.name_of(before) is not None or base.name_of(after) is not None:
        return (before,)  # norms after each block too: post_attention_layernorm is then one of those
    return (f"{layer}.post_attention_layernorm.weight",)
