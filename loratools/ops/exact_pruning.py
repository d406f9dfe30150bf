"""Hidden units that a bottleneck has no need of, whatever its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.ops.bottleneck import Bottleneck


@dataclass(frozen=True)
class Removed:
    """How many units went, and why: each counts once, in this order."""

    duplicates: int
    constant: int
    zero: int


@dataclass(frozen=True, eq=False)
class Exact:
    """A bottleneck of fewer units: their indices in ascending order, the `up` (m, w) of all with zeros for the others.

    `up` and `up_bias` are float64; `padding` are the units that are not needed, which may stay, as their columns are 0.
    """

    units: Tensor
    up: Tensor
    up_bias: Tensor | None
    padding: Tensor
    removed: Removed

    def padded(self, width: int) -> Tensor:
        """Indices of the units to store for at least `width` of them, in ascending order."""
        return torch.cat([self.units, self.padding[: max(0, width - len(self.units))]]).sort().values


def pruned_exactly(b: Bottleneck) -> Exact:
    """What is left without the units that change nothing.

    Units of equal rows and biases of `down` are one, whose column of `up` is the sum of theirs. One with a zero row is
    constant: it goes into the bias of `up`, or stays where there is none to hold it. One with a zero column goes.
    """
    down, up = b.down.double(), b.up.double().clone()
    bias = torch.zeros(b.width, dtype=torch.float64) if b.down_bias is None else b.down_bias.double()
    up_bias = None if b.up_bias is None else b.up_bias.double().clone()
    alive = torch.ones(b.width, dtype=torch.bool)

    rows = torch.cat([down, bias[:, None]], dim=1)
    same = torch.unique(rows, dim=0, return_inverse=True)[1]
    first = torch.full((b.width,), b.width).scatter_reduce(0, same, torch.arange(b.width), "amin")[same]
    doubled = first != torch.arange(b.width)
    up.index_add_(1, first[doubled], up[:, doubled])
    up[:, doubled] = 0.0
    alive &= ~doubled

    constant = alive & (down == 0).all(1)
    values = b.act(bias)
    if up_bias is None:
        constant &= values == 0
    else:
        up_bias += up[:, constant] @ values[constant]
    up[:, constant] = 0.0
    alive &= ~constant

    zero = alive & (up == 0).all(0)
    alive &= ~zero
    removed = Removed(int(doubled.sum()), int(constant.sum()), int(zero.sum()))
    return Exact(alive.nonzero()[:, 0], up, up_bias, (~alive).nonzero()[:, 0], removed)
