"""RandLoRA: a sum of random low-rank matrices, scaled on both sides (Albert et al. 2025, arXiv 2502.00987; PEFT)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, final

from loratools._lazy import torch
from loratools.errors import AdapterError, NeedsBaseError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.randlora_fit import alternated
from loratools.families.random_projections import draw_of
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_SHARED = ("randlora_A", "randlora_B")
Draw = Literal["dense", "sparse", "very_sparse"]
_MOST_BASES = 256  # that a budget asks for: each column of the shorter side is a system of so many unknowns


@dataclass(frozen=True)
class RandLoRAOptions:
    """`rank`: of each base, of which there are so many that they reach full rank together: the lower, the more numbers.

    `draw`: the numbers of the bases, dense, sparse or very_sparse. `sweeps`: at most, over both diagonals.
    """

    rank: int = 32
    draw: str = "dense"
    sweeps: int = 20


@final
@dataclass(frozen=True, eq=False)
class RandLoRA(Fittable):
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
    Options: ClassVar[type[RandLoRAOptions]] = RandLoRAOptions
    guarantee: ClassVar[Guarantee] = "local"
    formula: ClassVar[str] = "sum over j of B_j L_j A G_j, with B_j and A drawn from a seed, L_j and G_j diagonal"
    count: ClassVar[str] = "j (r + min(m, n)), j = min(m, n) / r rounded up"
    paper: ClassVar[str] = "Albert et al. 2025, arXiv 2502.00987"

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
        seed, largest = draw_of(settings)
        draw = next((each for each in _DRAWS.values() if each == settings.get("draw", "dense")), None)
        if draw is None:
            raise AdapterError(
                f"its settings state {settings['draw']!r} for draw, which is none of {', '.join(_DRAWS)}"
            )
        return cls(left, right, stored, seed, draw, largest, scale, layout)

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

    def shared_tensors(self) -> dict[str, Tensor]:
        return dict(zip(_SHARED, self.stored or (), strict=False))

    def stated_settings(self) -> dict[str, Any]:
        if self.stored is not None or self.largest is None:
            return {} if self.seed is None else {"seed": self.seed, "draw": self.draw}
        return {"seed": self.seed, "draw": self.draw, "largest": list(self.largest)}

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

    @classmethod
    def encode(cls, source: Source, options: RandLoRAOptions) -> RandLoRA:
        """As for several targets, with bases of this one's own size."""
        return cls.encode_together({"": source}, options)[""]

    @classmethod
    def encode_together(cls, sources: Mapping[str, Source], options: RandLoRAOptions) -> dict[str, RandLoRA]:
        """Both diagonals in turn, each by least squares, with bases as large as the largest target.

        A sweep costs short^2 (long + short), for the sides of the matrix, and j^3 short / 3.
        """
        largest = (max(s.shape[0] for s in sources.values()), max(s.shape[1] for s in sources.values()))
        if not 1 <= options.rank <= min(largest):
            raise UsageError(f"randlora: a rank of {options.rank} is not between 1 and {min(largest)}")
        draw = _DRAWS.get(options.draw)
        if draw is None:
            raise UsageError(f"randlora: draw is {options.draw!r}, not one of {', '.join(_DRAWS)}")
        found = {}
        for target, source in sources.items():
            (m, n), short = source.shape, min(source.shape)
            a, b = drawn(options.rank, max(largest), min(largest), source.seed, draw)
            count = math.ceil(short / options.rank)
            a, b = a[:, 0, :short].double(), b[: max(m, n), :count].double()
            left, right = alternated(source.delta if n == short else source.delta.T, a, b, options.sweeps)
            left, right = cast_to(left, source.stored), cast_to(right, source.stored)
            found[target] = cls(left, right, None, source.seed, draw, largest, 1.0, source.layout)
        return found

    @classmethod
    def within(cls, source: Source, nbytes: int) -> RandLoRAOptions | None:
        return _richest([source], nbytes)

    @classmethod
    def size(cls, source: Source, options: RandLoRAOptions) -> int:
        return _count(min(source.shape), options.rank) * source.stored.itemsize

    @classmethod
    def within_together(cls, sources: Mapping[str, Source], nbytes: int) -> dict[str, RandLoRAOptions]:
        """One rank for all."""
        options = _richest(list(sources.values()), nbytes)
        if options is None:
            raise UsageError(
                f"a budget of {nbytes} bytes is too small for {cls.family}, which has two numbers for each row or "
                "column of the shorter side"
            )
        return dict.fromkeys(sources, options)

    @classmethod
    def expected_energy(cls, source: Source, options: RandLoRAOptions) -> float:
        (m, n), short = source.shape, min(source.shape)
        count = math.ceil(short / options.rank)
        return min(1.0, count * (options.rank + short - 1) / (m * n))

    def _drawn(self) -> tuple[Tensor, Tensor]:
        if self.seed is None or self.largest is None:
            raise NeedsBaseError(
                "its random projections were not saved (save_projection is false), and depend on the base weight's "
                "largest target; load the adapter with the base: --base, or load(..., base=load_base(...))"
            )
        return drawn(len(self.left), max(self.largest), min(self.largest), self.seed, self.draw)


_DRAWS: dict[str, Draw] = {"dense": "dense", "sparse": "sparse", "very_sparse": "very_sparse"}


def _count(short: int, rank: int) -> int:
    return math.ceil(short / rank) * (rank + short)


def _richest(sources: list[Source], nbytes: int) -> RandLoRAOptions | None:
    """The lowest rank whose numbers for all sources take at most `nbytes`."""
    shorts = [(min(source.shape), source.stored.itemsize) for source in sources]
    most = max(short for short, _ in shorts)
    for rank in range(max(1, math.ceil(most / _MOST_BASES)), most + 1):
        if sum(_count(short, rank) * item for short, item in shorts) <= nbytes:
            return RandLoRAOptions(rank)
    return None


@lru_cache(maxsize=2)  # all targets share them
def drawn(rank: int, long: int, short: int, seed: int, draw: Draw) -> tuple[Tensor, Tensor]:
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
