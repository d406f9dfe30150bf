"""A fixed-length vector for an adapter, whose cosines estimate those of the whole deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from loratools._lazy import torch
from loratools.errors import AdapterError, naming
from loratools.linalg.projection import SIDE, projected
from loratools.operators import Dense, LowRank, Operator, sum_of
from loratools.ops.matching import modules_changed
from loratools.ops.spectra import is_finite_update, nonfinite_error
from loratools.pipeline import ordered_map

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.formats.modules import Module, Rows

LENGTH: Final = SIDE * SIDE
SEED: Final = 1  # another one whenever a sketch comes to mean something else: those of two seeds are not compared


def sketch(adapter: Adapter) -> NDArray[np.float32]:
    """(LENGTH,) float32: random projections of the deltas of all modules, added up.

    The same delta has the same sketch, up to rounding, whatever its factors, rank, family and dialect. The inner
    product of two sketches estimates that of the deltas without bias, and a cosine c with a standard error near
    (1 - c^2) / sqrt(LENGTH) where many targets of sides far above SIDE change, at most (1 - c^2) sqrt(2 / SIDE) where a
    single one of rank 1 does. AdapterError for what has no delta without its base, and for NaN and infinity.
    """
    refuse_unknown(adapter)
    deltas = Deltas(adapter)

    def work(module: Module) -> Tensor:
        return projected(deltas.of(module), str(module), SEED).flatten().double()

    total = torch.zeros(LENGTH, dtype=torch.float64)
    for part in ordered_map(work, deltas.modules, workers=1):  # on one core, so that all machines add alike
        total += part
    found: NDArray[np.float32] = total.float().numpy()
    if not np.isfinite(found).all():
        raise AdapterError("its numbers are too large to be multiplied in float32")
    return found


def refuse_unknown(adapter: Adapter) -> None:
    """AdapterError for an adapter whose delta is not known from its file alone."""
    adapter.require_weights()
    if (target := next((t for t, entry in adapter.entries.items() if entry.needs_base), None)) is not None:
        family = adapter.entries[target].family.family
        raise AdapterError(f"{target}: the delta of {family} depends on the base weight")
    if (init := adapter.format.mutated_init) is not None:
        raise AdapterError(f"trained with init_lora_weights={init!r}, so it is relative to a base of its own")
    if not adapter.entries:
        raise AdapterError("it holds no update of a weight")


class Deltas:
    """The delta of each module that an adapter changes, read one target at a time."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._modules = modules_changed(adapter)
        self._target = ""
        self._operator: Operator | None = None  # of the last target: several modules may be rows of it
        self.changes_biases = False  # as far as targets have been read

    @property
    def modules(self) -> Sequence[Module]:
        """In the order of the targets."""
        return tuple(self._modules)

    def find(self, module: Module) -> Operator | None:
        """The delta of a module; None where it is not changed."""
        return self.of(module) if module in self._modules else None

    def of(self, module: Module) -> Operator:
        """The delta of one of the modules."""
        parts = [self._rows(target, rows) for target, rows in self._modules[module]]
        with naming(str(module)):
            if len({part.shape for part in parts}) > 1:
                raise AdapterError("two targets change this module, and have different shapes")
        return sum_of(parts)

    def _rows(self, target: str, rows: Rows) -> Operator:
        op = self._read(target)
        if rows.is_whole:
            return op
        with naming(target):
            try:
                indices = rows.indices(op.shape[0])
            except ValueError as error:
                raise AdapterError(str(error)) from error
            if isinstance(op, LowRank):
                return LowRank(op.left[indices], op.right, op.scale)
            return Dense(op.dense()[indices])

    def _read(self, target: str) -> Operator:
        if self._operator is None or target != self._target:
            update = self._adapter.entries[target].read()
            if not is_finite_update(update):
                raise nonfinite_error(target, "see the others with inspect --allow-nonfinite")
            with naming(target):
                self._operator = update.operator()
                self.changes_biases |= update.bias_delta() is not None
            self._target = target
        return self._operator
