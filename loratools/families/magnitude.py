"""A DoRA magnitude on a direction that is no LoRA: weight' = magnitude * V / ||V||, V = base + direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import Layout, base_matrix
from loratools.operators import Dense

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.operators import Operator
    from loratools.storage.base import TensorSpec


def magnitude_problem(magnitude: TensorSpec, shape: tuple[int, ...], layout: Layout) -> str | None:
    """What is wrong with the number of magnitudes for a base of `shape`, whose taps may be flattened into inputs."""
    if layout.transposed:
        shape = shape[::-1]
    count, numel = shape[layout.magnitude_axis], magnitude.numel
    flattened = layout.magnitude_axis == 1 and len(shape) == 2 and numel > 0 and count % numel == 0
    return None if numel == count or flattened else f"the magnitude holds {numel} numbers where {count} are needed"


def decomposed(family: str, direction: Operator, magnitude: Tensor, base: Tensor | None, layout: Layout) -> Dense:
    """The delta as (m, n); norms run over a whole row, or along the inputs over a channel's column with all its taps.

    Raises NeedsBaseError without a base, and AdapterError for one of another shape.
    """
    matrix = base_matrix(family, base, layout)
    assert base is not None  # or base_matrix had raised
    if tuple(matrix.shape) != direction.shape:
        raise AdapterError(f"the base weight is {tuple(matrix.shape)} where the update is {direction.shape}")
    gains, axis = magnitude.flatten().double(), layout.magnitude_axis
    channels = matrix.shape[axis] if base.ndim < 3 else base.shape[axis]
    if gains.numel() != channels:
        raise AdapterError(f"{gains.numel()} magnitudes for the {channels} channels of the base weight")
    v = matrix + direction.to(torch.float64).dense()
    rows = v.T if axis else v
    norms = rows.reshape(channels, -1).norm(dim=1)
    scaled = rows.reshape(channels, -1) * torch.where(norms > 0, gains / norms, 0.0).unsqueeze(1)
    scaled = scaled.reshape(rows.shape)
    return Dense((scaled.T if axis else scaled) - matrix)
