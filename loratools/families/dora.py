"""DoRA: weight' = magnitude * V / ||V||, V = base + LoRA, with norms along one axis (Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, NeedsBaseError
from loratools.families.base import NO_SETTINGS, Layout, LowRankUpdate, Settings
from loratools.families.lora import LoRA, cast_to
from loratools.linalg.row_norms import row_norms
from loratools.operators import Dense, LowRank, Operator, sum_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@dataclass(frozen=True, eq=False)
class _Gain:
    """What the base adds: delta = diag(gain - 1) base + diag(gain) low, along the magnitude's axis."""

    base: Tensor  # (m, n) float64, transposed where the magnitude runs along the inputs
    low: LowRank  # likewise
    norms: Tensor  # (m,) of base + low
    gain: Tensor  # (m,)


@final
@dataclass(frozen=True, eq=False)
class DoRA(LowRankUpdate):
    """A LoRA direction with a magnitude for each output (`magnitude_axis` 0) or each input channel (1)."""

    family: ClassVar[str] = "dora"
    required: ClassVar[frozenset[str]] = frozenset({"down", "up", "magnitude"})
    optional: ClassVar[frozenset[str]] = frozenset({"mid", "up_bias"})
    needs_base: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("up", "up_bias")

    direction: LoRA
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
    ) -> DoRA:
        slots = {slot: tensor for slot, tensor in parameters.items() if slot != "magnitude"}
        return cls(LoRA.from_parameters(slots, scale=scale, layout=layout), parameters["magnitude"])

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        slots = {slot: spec for slot, spec in specs.items() if slot != "magnitude"}
        if problem := LoRA.check(slots, layout):
            return problem
        if layout.experts > 1 or ("mid" not in slots and slots["up"].shape[1] != slots["down"].shape[0]):
            return "a magnitude on experts or on a grouped convolution is not supported"
        count = (slots["up"].shape[0], slots["down"].shape[1])[layout.magnitude_axis]
        numel = specs["magnitude"].numel
        return None if numel == count else f"the magnitude holds {numel} numbers where {count} are needed"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return LoRA.rank_of(specs, layout)

    @classmethod
    def rank_step(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return 1

    @classmethod
    def bytes_per_rank(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return LoRA.bytes_per_rank(specs, layout)

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        return LoRA.base_shape(specs, layout)

    def parameters(self) -> dict[str, Tensor]:
        return {**self.direction.parameters(), "magnitude": self.magnitude}

    def _gain(self, base: Tensor | None) -> _Gain:
        if base is None:
            raise NeedsBaseError("the delta of DoRA depends on the base weight")
        matrix = base.T if self.layout.transposed else base.flatten(1)
        low = self.direction.operator()
        assert isinstance(low, LowRank)
        if tuple(matrix.shape) != low.shape:
            raise AdapterError(f"the base weight is {tuple(matrix.shape)} where the update is {low.shape}")
        matrix, low = matrix.double(), low.to(torch.float64)
        if self.layout.magnitude_axis == 1:
            matrix, low = matrix.T, low.T
        norms = row_norms(matrix, low)
        magnitude = self.magnitude.flatten().double()
        if magnitude.numel() != norms.numel():  # a convolution's input channel spans all taps of the kernel
            taps = norms.numel() // magnitude.numel()
            norms = norms.reshape(-1, taps).square().sum(1).sqrt().repeat_interleave(taps)
            magnitude = magnitude.repeat_interleave(taps)
        return _Gain(matrix, low, norms, torch.where(norms > 0, magnitude / norms, 0.0))

    def magnitude_gains(self, base: Tensor | None = None) -> Tensor:
        return self._gain(base).gain

    def operator(self, base: Tensor | None = None) -> Operator:
        g = self._gain(base)
        rows = g.gain.unsqueeze(1)
        total = sum_of([Dense((rows - 1) * g.base), LowRank(rows * g.low.left, g.low.right, g.low.scale)])
        return total.T if self.layout.magnitude_axis == 1 else total

    def low_rank_part(self, base: Tensor | None = None) -> Operator:
        g = self._gain(base)
        part = LowRank(g.gain.unsqueeze(1) * g.low.left, g.low.right, g.low.scale)
        return part.T if self.layout.magnitude_axis == 1 else part

    def direction_operator(self) -> Operator:
        return self.direction.operator()

    def fit(self, part: Operator, *, scale: float, base: Tensor | None = None) -> DoRA:
        """Directions keep the gains; magnitudes are then refitted by least squares to the stored directions.

        With gains g, the new direction is diag(1/g) part, so that the error of the delta is that of `part`; the optimum
        of each row for unit vectors v'/||v'|| is m' = g <v, v'> / ||v'||.
        """
        if not isinstance(part, LowRank):
            raise AdapterError("a DoRA direction holds low-rank operators only")
        g = self._gain(base)
        part = part.T if self.layout.magnitude_axis == 1 else part
        inverse = torch.where(g.gain != 0, 1 / g.gain, 0.0).unsqueeze(1)
        fitted = LowRank(inverse * part.left.cpu().double(), part.right.cpu().double(), part.scale)
        direction = self.direction.fit(fitted.T if self.layout.magnitude_axis == 1 else fitted, scale=scale)
        stored = direction.operator()
        assert isinstance(stored, LowRank)
        stored = stored.to(torch.float64)
        new = stored.T if self.layout.magnitude_axis == 1 else stored
        norms = row_norms(g.base, new)
        v, v_new = g.base + g.low.dense(), g.base + new.dense()
        products = g.gain * (v * v_new).sum(1)  # <weight'_i, v'_i>
        if norms.numel() != self.magnitude.numel():
            taps = norms.numel() // self.magnitude.numel()
            norms = norms.reshape(-1, taps).square().sum(1).sqrt()
            products = products.reshape(-1, taps).sum(1)
        magnitude = torch.where(norms > 0, products / norms, 0.0).reshape(self.magnitude.shape)
        return DoRA(direction, cast_to(magnitude, self.magnitude.dtype))

    def with_direction(self, part: Operator, *, scale: float) -> DoRA:
        return DoRA(self.direction.with_direction(part, scale=scale), self.magnitude)

    def minus(self, other: DoRA) -> DoRA:
        raise AdapterError("DoRA updates cannot be subtracted: their magnitudes do not add")

    def prefix(self, rank: int, *, delta_scale: float, scale: float) -> DoRA:
        raise AdapterError("a prefix is not defined for DoRA: its magnitude belongs to the whole direction")

    def bias_delta(self, bias: Tensor | None = None) -> Tensor | None:
        return self.direction.bias_delta()
