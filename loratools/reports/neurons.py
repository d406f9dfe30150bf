"""What nonlinear bottlenecks are, and what is left of those that were pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class NeuronsTarget:
    """One bottleneck, and its linearisation J = scale * up diag(E act'(z)) down, which is a view of it and no delta.

    `constant`, `duplicates` and `zero` count the hidden units that can be removed exactly. `scale` is null for one
    number to a channel. `gain` is the mean of E act'(z) over units; `norm` is |J|, and `stable_rank` |J|^2 over the
    square of the largest of its singular values, all of which are listed; `rank_99` of them hold 99 % of the energy.
    """

    kind: str
    width: int
    inputs: int
    outputs: int
    activation: str
    scale: float | None
    parameters: int
    constant: int
    duplicates: int
    zero: int
    gain: float
    norm: float
    stable_rank: float
    rank_99: int
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class NeuronsReport:
    """`linearised` says where the derivative was taken: over `activations`, or for z `standard normal`."""

    path: str
    linearised: str
    targets: Mapping[str, NeuronsTarget]
    parameters: int
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
