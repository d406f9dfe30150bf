"""RandLoRA: a sum of random low-rank matrices, scaled on both sides (Albert et al. 2025, arXiv 2502.00987; PEFT)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, final

from loratools._lazy import torch
from loratools.errors import AdapterError, NeedsBaseError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_size
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_SHARED = ("randlora_A", "randlora_B")
Draw = Literal["dense", "sparse", "very_sparse"]


@final
@dataclass(frozen=True, eq=False)
class RandLoRA(Update):
    """lambda (r, j) and gamma (j, shorter side), which scale the shared A (r, 1, shortest) and B (longest, j, r).

    PEFT pairs the columns of B, ordered by j and then r, with the rows of A, ordered by r and then j, which is not the
    paper's sum but as expressive. The base weight's shape is needed. Projections that were not saved are drawn from the
    setting `seed` as `draw` says, by torch's generator of random numbers and in bfloat16 as on current hardware.
    """

    family: ClassVar[str] = "randlora"
    required: ClassVar[frozenset[str]] = frozenset({"randlora_lambda", "randlora_gamma"})
    references: ClassVar[frozenset[str]] = frozenset(_SHARED)
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True

    left: Tensor
    right: Tensor
    stored: tuple[Tensor, Tensor] | None
    seed: int | None
    draw: Draw
    largest: tuple[int, int] | None  # (widest output, widest input) of all targets
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> RandLoRA:
        left, right = parameters["randlora_lambda"], parameters["randlora_gamma"]
        stored = None
        if set(_SHARED) <= set(parameters):
            a, b = stored = (parameters["randlora_A"], parameters["randlora_B"])
            if a.ndim != 3 or b.ndim != 3 or a.shape[:2] != (len(left), 1) or b.shape[2] != len(left):
                raise AdapterError(
                    f"randlora_A {tuple(a.shape)} and randlora_B {tuple(b.shape)} do not fit a rank of {len(left)}"
                )
        found = (settings.get(key) for key in ("seed", "draw", "largest"))
        seed, draw, largest = found
        return cls(left, right, stored, seed, draw or "dense", largest, scale, layout)

    @classmethod
    def redrawn(cls, settings: Settings) -> frozenset[str]:
        return cls.references if "seed" in settings else frozenset()

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        left, right = specs["randlora_lambda"].shape, specs["randlora_gamma"].shape
        fits = len(left) == len(right) == 2 and 0 not in left + right and left[1] == right[0]
        return None if fits else f"randlora_lambda {left} and randlora_gamma {right} do not chain"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["randlora_lambda"].shape[0]

    def parameters(self) -> dict[str, Tensor]:
        return {"randlora_lambda": self.left, "randlora_gamma": self.right}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("RandLoRA", base, self.layout)
        a, b = self.stored or self._drawn()
        count, short = self.right.shape
        if short != min(m, n) or b.shape[0] < max(m, n) or b.shape[1] < count or a.shape[2] < short:
            raise AdapterError(
                f"the base weight is {(m, n)} where gamma is {tuple(self.right.shape)} and the projections are "
                f"{tuple(a.shape)} and {tuple(b.shape)}; is it the right base?"
            )
        rows = self.left.double().unsqueeze(2) * a[:, :, :short].double() * self.right.double()  # (r, j, short)
        tall = b[: max(m, n), :count].double().flatten(1) @ rows.flatten(0, 1)
        return Dense((tall if n == short else tall.T) * self.scale)

    def _drawn(self) -> tuple[Tensor, Tensor]:
        if self.seed is None or self.largest is None:
            raise NeedsBaseError(
                "its random projections were not saved (save_projection is false), and depend on the base weight's "
                "largest target; load the adapter with the base: --base, or load(..., base=load_base(...))"
            )
        return _drawn(len(self.left), max(self.largest), min(self.largest), self.seed, self.draw)


@lru_cache(maxsize=2)  # all targets share them
def _drawn(rank: int, long: int, short: int, seed: int, draw: Draw) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = math.ceil(short / rank)
    if draw != "dense":
        bar = 1 / (2 * (3 if draw == "sparse" else math.sqrt(short)))
        uniform = [torch.rand(shape, generator=generator) for shape in ((rank, 1, short), (long, count, rank))]
        a, b = ((u > 1 - bar).float() - (u < bar).float() for u in uniform)
        return a / a.std(), b / b.std()

    def one(*shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16)
        return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

    a = one(rank, 1, short)
    b = torch.cat([one(long, 1, rank) for _ in range(count)], dim=1)
    return a / a.std(), b / b.std()
