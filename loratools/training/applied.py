"""A model in memory with an adapter of any family added to its weights, as `fuse` does it in files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from loratools._lazy import torch
from loratools.base_weights import BaseWeights
from loratools.errors import AdapterError
from loratools.ops.delta import delta, parameters_of_target
from loratools.ops.fuse import refuse_unfusable
from loratools.storage.base import TensorSource
from loratools.storage.header import spec_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from loratools.adapter import Adapter

_BARE = "a model that has it inside already is run as it is: --bare, Calibrate(bare=True)"


@contextmanager
def applied(model: Module, adapter: Adapter) -> Iterator[None]:
    """Within the block the weights of `model` are those with the adapter; afterwards what they were, bit by bit.

    What is changed is kept on the CPU meanwhile. Sums are made in float32 and rounded once to the model's dtype. An
    update of a head that is tied to the embedding is left out: it changes nothing that enters a layer. AdapterError
    where an update does not fit the model, or is none of weights.
    """
    kept: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    try:
        _add(model, adapter, parameters, kept)
        yield
    finally:
        with torch.no_grad():
            for name, weight in reversed(kept.items()):  # the first copy of a shared weight counts
                parameters[name].copy_(weight)


def apply(model: Module, adapter: Adapter) -> None:
    """As `applied`, for good, and without a copy of what was changed; after an error the model is of no use."""
    _add(model, adapter, dict(model.named_parameters(remove_duplicate=False)), None)


def base_of(model: Module) -> BaseWeights:
    """The weights of a model in memory as the base that DoRA and its like need, each read when it is asked for."""
    return BaseWeights(_InMemory(dict(model.named_parameters(remove_duplicate=False))))


def _add(model: Module, adapter: Adapter, parameters: Mapping[str, Tensor], kept: dict[str, Tensor] | None) -> None:
    try:
        refuse_unfusable(adapter)
    except AdapterError as error:
        raise type(error)(f"{error}; {_BARE}") from error
    base = BaseWeights(_InMemory(parameters))
    for target in adapter.entries:
        if not parameters_of_target(adapter, target, base):
            raise AdapterError(
                f"{target}: the model has no parameter for it; is it the base of this adapter? {_BARE.capitalize()}"
            )
    left_out = _tied_head(model, parameters)
    with torch.no_grad():
        for name, change in delta(adapter, base=base):
            if name in left_out:
                continue
            if name not in parameters:
                raise AdapterError(f"{name}: the adapter changes it, and the model has no such parameter; {_BARE}")
            weight = parameters[name]
            if not weight.is_floating_point() or weight.element_size() < 2:
                raise AdapterError(
                    f"{name}: the model holds it as {weight.dtype}; load it in 16 or 32 bits, or {_BARE}"
                )
            total = (weight.float() + change.to(weight.device)).to(weight.dtype)
            if not bool(torch.isfinite(total).all()):
                raise AdapterError(f"{name}: model and update make NaN or infinity in {weight.dtype}")
            if kept is not None and name not in kept:
                kept[name] = base.source.read(name)
            weight.copy_(total)


def _tied_head(model: Any, parameters: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of the head's weight where the embedding shares it."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    first, last = (getattr(module, "weight", None) for module in ends)
    if first is None or first is not last:
        return frozenset()
    names = {f"{path}.weight" for path, module in model.named_modules() if module is ends[1]}
    return frozenset(names & set(parameters))


@final
class _InMemory(TensorSource):
    """The parameters of a model as if they were a file."""

    container = "memory"
    path = Path("the model")
    metadata: Mapping[str, str] = {}

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self.specs = {name: spec_of(parameter) for name, parameter in parameters.items()}
        self.nbytes = sum(spec.nbytes for spec in self.specs.values())

    def read(self, name: str) -> Tensor:
        return self._parameters[name].detach().cpu().clone()

    def close(self) -> None:
        return

    def sha256(self) -> str:
        raise NotImplementedError("a model in memory has no bytes of a file")
