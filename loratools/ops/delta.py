"""The dense updates, in the layout of the base parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError, NeedsBaseError, naming
from loratools.ops.spectra import is_finite_update, nonfinite_error
from loratools.reports.delta import DeltaReport
from loratools.storage.atomic import refuse_existing
from loratools.storage.safetensors import SafetensorsSink

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights


def delta(
    adapter: Adapter, *, base: BaseWeights | None = None, target: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(base parameter, float32 update in its layout) for every target, or those that match `target`, one at a time.

    Bias updates follow their weights; tensors that replace a parameter outright give value - base, and only where there
    is a base. Without one, names are the adapter's own; an update of fused projections comes apart where the base has
    them one by one. Raises NeedsBaseError for DoRA without a base.
    """
    adapter.require_weights()
    replaced = {} if base is None else replacements(adapter, base)
    for name in adapter.select(target) if target else adapter.entries:
        for parameter, dense in delta_of_target(adapter, name, base):
            yield parameter, dense + replaced.pop(parameter)() if parameter in replaced else dense
    if target is None:
        for parameter, change in replaced.items():
            yield parameter, change()


def parameters_of_target(adapter: Adapter, name: str, base: BaseWeights) -> tuple[str, ...]:
    """The base parameters that `delta_of_target` may name, biases included; empty where the base lacks the weight."""
    whole = base.name_of(adapter.format.parameter(name))
    weights = [whole] if whole is not None else list(_pieces(adapter, name, base))
    biases = (f"{weight.removesuffix('.weight')}.bias" for weight in weights)
    return (*weights, *(bias for bias in biases if bias in base.source.specs and bias not in weights))


def delta_of_target(adapter: Adapter, name: str, base: BaseWeights | None) -> Iterator[tuple[str, Tensor]]:
    """As `delta`, for one target."""
    entry = adapter.entries[name]
    parameter = adapter.format.parameter(name)
    weight = None
    pieces = {} if base is None else _pieces(adapter, name, base)
    if base is not None and pieces:
        weight = _fused(pieces, base, entry.base_shape or ())
    elif base is not None:
        parameter, weight = _base_parameter(base, parameter, entry.base_shape, experts=entry.layout.experts > 1)
    elif entry.needs_base:
        raise NeedsBaseError(f"{name}: the delta of {entry.family.family} depends on the base weight; pass --base")
    update = entry.read()
    if not is_finite_update(update):
        raise nonfinite_error(name, "choose others with --target")
    with naming(name):
        dense = update.delta(weight if entry.needs_base else None)
    if weight is not None and dense.shape != weight.shape:
        if dense.ndim == 3 and dense.mT.shape == weight.shape:
            dense = dense.mT.contiguous()  # experts stored as (experts, in, out)
        else:
            dense = dense.reshape(weight.shape)
    if pieces:
        whole_bias = update.bias_delta()
        for part, rows in pieces.items():
            yield part, dense[rows].contiguous()
            if whole_bias is not None:
                yield f"{part.removesuffix('.weight')}.bias", whole_bias[rows].contiguous()
        return
    yield parameter, dense
    name_of_bias = f"{parameter.removesuffix('.weight')}.bias"
    bias = base.source.read(name_of_bias) if base is not None and name_of_bias in base.source.specs else None
    with naming(name):
        change = update.bias_delta(bias)
    if change is not None:
        yield name_of_bias, change


def _pieces(adapter: Adapter, name: str, base: BaseWeights) -> dict[str, Tensor]:
    """The base's parameters that a target's rows belong to, where the base has those and not the target's own."""
    entry = adapter.entries[name]
    if base.name_of(adapter.format.parameter(name)) is not None or not entry.base_shape:
        return {}
    if entry.layout.transposed or entry.layout.experts > 1:
        return {}
    placement = adapter.format.place(name)
    found: dict[str, Tensor] = {}
    for piece in placement.pieces if placement else ():
        parameter = base.name_of(f"{piece.module.path}.weight")
        if parameter is None:
            return {}
        found[parameter] = piece.rows.indices(entry.base_shape[0])
    return found


def _fused(pieces: Mapping[str, Tensor], base: BaseWeights, shape: tuple[int, ...]) -> Tensor | None:
    """The base weight of the whole target, None where its pieces do not make all of it."""
    weights = [base.find(parameter, (len(rows), *shape[1:])) for parameter, rows in pieces.items()]
    order = torch.cat(list(pieces.values()))
    if not torch.equal(order.sort().values, torch.arange(shape[0])):
        return None
    stacked = torch.cat(weights)
    whole = torch.empty_like(stacked)
    whole[order] = stacked
    return whole


def replacements(adapter: Adapter, base: BaseWeights) -> dict[str, Callable[[], Tensor]]:
    """Base parameter -> its change, for the extras that replace one outright and that the base has."""

    def change(key: str, parameter: str) -> Tensor:
        extra = adapter.extras[key]
        return (extra.read().double() - base.find(parameter, extra.spec.shape).double()).float()

    found: dict[str, Callable[[], Tensor]] = {}
    for key, parameter in adapter.format.replacements().items():
        if (name := base.name_of(parameter)) is not None:
            found[name] = partial(change, key, parameter)
    return found


def _base_parameter(
    base: BaseWeights, parameter: str, shape: tuple[int, ...] | None, *, experts: bool
) -> tuple[str, Tensor]:
    name = base.name_of(parameter)
    if (
        experts
        and shape is not None
        and name is not None
        and base.source.specs[name].shape == (shape[0], shape[2], shape[1])
    ):
        return name, base.source.read(name)
    return name or parameter, base.find(parameter, shape)


def delta_file(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    base: BaseWeights | None = None,
    target: str | None = None,
    force: bool = False,
) -> DeltaReport:
    """As `delta`, streamed to a safetensors file."""
    adapter.require_weights()
    place = Path(path)
    refuse_existing(place, force=force)
    shapes: dict[str, tuple[int, ...]] = {}
    skipped = dict(adapter.unsupported)
    with SafetensorsSink(place) as sink:
        for name, tensor in delta(adapter, base=base, target=target):
            if name in shapes:
                raise AdapterError(f"{name}: two updates of one base parameter")
            sink.write(name, tensor)
            shapes[name] = tuple(tensor.shape)
        nbytes = sink.commit({"format": "pt"})
    if target is None:
        for key, parameter in adapter.format.replacements().items():
            if base is None:
                skipped[key] = "replaces a parameter outright; pass --base for its change"
            elif base.name_of(parameter) is None:
                skipped[key] = f"the base has no parameter {parameter}"
        skipped |= {key: "belongs to no update" for key in adapter.extras if key not in adapter.format.replacements()}
    return DeltaReport(str(place), shapes, skipped, nbytes, adapter.warnings)
