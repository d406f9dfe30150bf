"""A DoRA magnitude on a direction that is no LoRA: weight' = magnitude * V / ||V||, V = base + direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_matrix
from loratools.operators import Dense

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from typing_extensions import Self

    from loratools.operators import Operator
    from loratools.storage.base import TensorSpec


class Decomposed(Update):
    """A direction of another family with a magnitude for each output (`magnitude_axis` 0) or each input channel (1)."""

    inner: ClassVar[type[Update]]  # the family of the direction
    needs_base: ClassVar[bool] = True

    direction: Update
    magnitude: Tensor

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.direction.scale

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        return self.direction.layout

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> Self:
        slots = {slot: tensor for slot, tensor in parameters.items() if slot != "magnitude"}
        direction = cls.inner.from_parameters(slots, scale=scale, layout=layout)
        return cls(direction, parameters["magnitude"])  # type: ignore[call-arg]  # final classes are dataclasses

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        slots = {slot: spec for slot, spec in specs.items() if slot != "magnitude"}
        if problem := cls.inner.check(slots, layout):
            return problem
        shape = cls.inner.base_shape(slots, layout)
        assert shape is not None  # of LoHa and LoKr it is known
        return magnitude_problem(specs["magnitude"], shape, layout)

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return cls.inner.rank_of(specs, layout)

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...] | None:
        return cls.inner.base_shape(specs, layout)

    def parameters(self) -> dict[str, Tensor]:
        return {**self.direction.parameters(), "magnitude": self.magnitude}


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
