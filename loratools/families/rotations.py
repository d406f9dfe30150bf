"""The orthogonal blocks of OFT and BOFT as LyCORIS stores them: Cayley transforms of skew parts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


def rotations(blocks: Tensor, constraint: float, outputs: int) -> Tensor:
    """R = (I + Q)(I - Q)^-1 in float64, Q = X - X^T for every block X of `blocks` (..., b, b).

    A positive `constraint` bounds the norm of all Q together by constraint * outputs.
    """
    q = blocks.double() - blocks.double().mT
    if constraint > 0 and (norm := float(q.norm())) > constraint * outputs:
        q = q * (constraint * outputs / norm)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(identity - q, identity + q)  # which commute


def constraint_of(settings: Mapping[str, Any]) -> float:
    """What the file keeps as alpha; 0, for none, where it has no alpha."""
    alpha = settings.get("alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"its constraint is {alpha!r}, not a number")
    return float(alpha)


def rescale_problem(specs: Mapping[str, TensorSpec], outputs: int) -> str | None:
    """What is wrong with the number of output gains, where there are any."""
    if "rescale" not in specs or specs["rescale"].numel == outputs:
        return None
    return f"rescale holds {specs['rescale'].numel} numbers where {outputs} are needed"


def rotated(rows: Tensor, rescale: Tensor | None, matrix: Tensor) -> Tensor:
    """The change from `matrix` to its rotated `rows`, which gains multiply where there are any; all (m, n)."""
    gains = 1.0 if rescale is None else rescale.reshape(-1, 1).double()
    return rows * gains - matrix


def check_outputs(matrix: Tensor, outputs: int) -> None:
    """AdapterError for a base weight with another number of outputs."""
    if matrix.shape[0] != outputs:
        raise AdapterError(f"the base weight has {matrix.shape[0]} outputs where the blocks have {outputs}")
