"""Adapters of single entries (SHiRA, arXiv 2406.13175) switched on and off in a running model, to the very bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.formats.modules import WHOLE
from loratools.operators import LowRank, Operator, Sparse, scattered
from loratools.training.models import module_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from loratools.adapter import Adapter

_PIECE = 1 << 15  # entries that are read and written in one go: what a processor's cache still holds at the second step


@dataclass(frozen=True, eq=False)
class Patch:
    """What one target changes, or a piece of it: some entries of a weight of the model, by their flat places in it."""

    target: str
    weight: Tensor
    places: Tensor  # (k,) int64
    changes: Tensor  # (k,) of the dtype in which they are added

    def read(self) -> Tensor:
        """The bits of the entries, (k,) integers of the size of the weight's numbers."""
        return self._bits.index_select(0, self.places)

    def write(self, bits: Tensor) -> None:
        """Other bits in their places."""
        self._bits.scatter_(0, self.places, bits)  # of integers: torch has no fast one for 16-bit floats

    @property
    def _bits(self) -> Tensor:
        return self.weight.detach().view(-1).view(getattr(torch, f"int{8 * self.weight.element_size()}"))


@dataclass(eq=False)
class Switch:
    """An adapter of entries laid out for a model; `apply` writes them, `undo` puts back what was there, bit by bit.

    Several can be on at once, and are undone in the reverse order. The weights change in place; nobody else may write
    the entries while a switch is on.
    """

    patches: tuple[Patch, ...]
    _before: list[Tensor] = field(default_factory=list)
    _written: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, model: Module, adapter: Adapter) -> Switch:
        """The switch of an adapter whose updates are all sparse, for a model of 16 bits or more, on any device.

        AdapterError for another family or content, or a target that the model lacks, by name.
        """
        if whole := adapter.format.replacements() or adapter.loose_extras:
            raise AdapterError(f"{next(iter(whole))}: is no part of an update; only entries of weights can be switched")
        if not adapter.entries:
            raise AdapterError("the adapter holds no update, so that there is nothing to switch")
        return cls(tuple(piece for target in adapter.entries for piece in _pieces(_patch(model, adapter, target))))

    @property
    def is_on(self) -> bool:
        """Whether the model has the adapter now."""
        return bool(self._written)

    @property
    def nbytes(self) -> int:
        """Bytes that the switch itself takes, of the places, the changes and, while it is on, what was there before."""
        held = [t for p in self.patches for t in (p.places, p.changes)]
        return sum(t.nbytes for t in (*held, *self._before, *self._written))

    def apply(self) -> None:
        """Add the entries to the weights, each rounded once; UsageError where they are on already."""
        if self.is_on:
            raise UsageError("the adapter is switched on already")
        for patch in self.patches:
            before = patch.read()
            sums = before.view(patch.weight.dtype).to(patch.changes.dtype) + patch.changes
            written = sums.to(patch.weight.dtype).view(before.dtype)
            patch.write(written)
            self._before.append(before)
            self._written.append(written)

    def undo(self) -> None:
        """Put back the entries as they were; UsageError where they are off, or were changed meanwhile: then none is."""
        if not self.is_on:
            raise UsageError("the adapter is not switched on")
        for i, patch in reversed(list(enumerate(self.patches))):  # where targets share a weight, the last comes first
            if not torch.equal(patch.read(), self._written[i]):
                for later, written in zip(self.patches[i + 1 :], self._written[i + 1 :], strict=True):
                    later.write(written)
                raise UsageError(f"{patch.target}: its entries were changed since; undo later switches first")
            patch.write(self._before[i])
        self._before.clear()
        self._written.clear()


@contextmanager
def switched(model: Any, adapter: Adapter) -> Iterator[Any]:
    """The model with the adapter's entries in place, and without them afterwards, as if they had never been there."""
    switch = Switch.of(model, adapter)
    switch.apply()
    try:
        yield model
    finally:
        switch.undo()


def _pieces(patch: Patch) -> Iterator[Patch]:
    parts = zip(patch.places.split(_PIECE), patch.changes.split(_PIECE), strict=True)
    return (replace(patch, places=places, changes=changes) for places, changes in parts)


def _patch(model: Module, adapter: Adapter, target: str) -> Patch:
    weight = _weight(model, adapter, target)
    if adapter.entries[target].base_shape not in (None, tuple(weight.shape)):
        raise AdapterError(f"{target}: the model's weight is {tuple(weight.shape)}; is it the base of this adapter?")
    update = adapter[target]
    try:
        op = update.operator(weight.detach().cpu())
    except AdapterError as error:
        raise type(error)(f"{target}: {error}") from error
    op = _entries(op)
    if not isinstance(op, Sparse):
        raise AdapterError(
            f"{target}: an update of {update.family} changes every entry; make single ones of it with loratools "
            "reparameterize --to sparse"
        )
    if not bool(torch.isfinite(op.values).all()):
        raise AdapterError(f"{target}: holds NaN or infinity")
    op = op.T if update.layout.transposed else op
    order = op.places.argsort()  # ascending, for the memory's sake
    dtype = torch.promote_types(weight.dtype, torch.float32)
    changes = op.values[order].to(device=weight.device, dtype=dtype)
    return Patch(target, weight, op.places[order].to(weight.device), changes)


def _entries(op: Operator) -> Operator:
    """Whole rows or columns, lowered to factors of which one is unit vectors, as entries; any other map as it is."""
    if not isinstance(op, LowRank):
        return op
    (m, n), order = op.shape, op.right.argmax(1)
    if torch.equal(op.right, torch.nn.functional.one_hot(order, n).to(op.right)):  # columns
        places = torch.arange(m, device=order.device).unsqueeze(1) * n + order
        return scattered(places.reshape(-1), op.left.reshape(-1) * op.scale, op.shape)
    order = op.left.argmax(0)
    if torch.equal(op.left.T, torch.nn.functional.one_hot(order, m).to(op.left)):  # rows
        places = order.unsqueeze(1) * n + torch.arange(n, device=order.device)
        return scattered(places.reshape(-1), op.right.reshape(-1) * op.scale, op.shape)
    return op


def _weight(model: Module, adapter: Adapter, target: str) -> Tensor:
    module = module_of(model, adapter, target)
    placement = adapter.format.place(target)
    assert placement is not None  # `module_of` refuses what has no place
    if len(placement.pieces) != 1 or placement.pieces[0].rows != WHOLE:
        raise AdapterError(f"{target}: is a part of a fused weight; convert the adapter to the model's own names first")
    weight = getattr(getattr(module, "base_layer", module), adapter.format.parameter(target).rpartition(".")[2], None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        raise AdapterError(f"{target}: the model holds no weight of 16 bits or more there; load it in such a dtype")
    if not weight.is_contiguous():
        raise AdapterError(f"{target}: the model's weight is a view of another tensor; make it contiguous")
    return weight
