"""The matrices of a base model that an adapter changes, each with its change as an operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.errors import naming
from loratools.operators import BlockDiagonal, Dense
from loratools.ops.delta import delta_of_target
from loratools.ops.spectra import is_finite_update, nonfinite_error

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.operators import Operator


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight as (outputs, inputs), whatever way the base stores it; `parameter` is its name in the base.

    `gain` holds the factors that a magnitude puts on its outputs or inputs, where the update has one.
    """

    parameter: str
    weight: Tensor  # (m, n), in the base's dtype
    change: Operator  # (m, n), scale included; low rank where the update is
    gain: Tensor | None = None


def unsuitable(adapter: Adapter, name: str) -> str | None:
    """Why a target is no single matrix with singular vectors of its own, or None."""
    layout = adapter.entries[name].layout
    if layout.embedding:
        return "an embedding table"
    return "a stack of experts" if layout.experts > 1 else None


def matrices_of_target(adapter: Adapter, name: str, base: BaseWeights) -> Iterator[Matrix]:
    """The matrices that one target changes: several where it fuses what the base keeps apart; norms are left out.

    Raises AdapterError, naming the target, where the base has no such weight or the update is not finite.
    """
    entry = adapter.entries[name]
    own = base.name_of(adapter.format.parameter(name))
    if own is not None and entry.is_factored:
        weight = base.find(own, entry.base_shape)
        update = entry.read()
        if not is_finite_update(update):
            raise nonfinite_error(name, "choose others with --target")
        with naming(name):
            needed = weight if entry.needs_base else None
            change, gain = update.operator(needed), update.magnitude_gains(needed)
        matrix = _oriented(weight, transposed=entry.layout.transposed)
        if not isinstance(change, BlockDiagonal) and change.shape == tuple(matrix.shape):
            yield Matrix(own, matrix, change, gain)
            return
    for parameter, dense in delta_of_target(adapter, name, base):
        weight = base.find(parameter, tuple(dense.shape))
        if parameter.endswith(".bias") or weight.ndim < 2:
            continue  # these have no directions
        sides = [_oriented(t, transposed=entry.layout.transposed) for t in (weight, dense.reshape(weight.shape))]
        yield Matrix(parameter, sides[0], Dense(sides[1]))


def _oriented(tensor: Tensor, *, transposed: bool) -> Tensor:
    matrix = tensor.flatten(1)
    return matrix.T if transposed else matrix
