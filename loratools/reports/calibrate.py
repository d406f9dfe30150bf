"""What statistics of activations were made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CalibratedTarget:
    """What enters one target.

    `energy` is E[|x|^2] / n, the mean square of an input; `effective_rank` says in how many directions of the factors
    it lies: (sum e)^2 / sum e^2 of the eigenvalues of the moment.
    """

    rank: int
    inputs: int
    energy: float
    effective_rank: float


@dataclass(frozen=True)
class CalibrateReport:
    """`texts` and `tokens` are 0 where there was no data; `bare`: the model ran as it was, without the adapter."""

    targets: Mapping[str, CalibratedTarget]
    texts: int
    tokens: int
    bytes: int
    output: str
    bare: bool = False
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
