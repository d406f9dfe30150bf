"""The two random matrices that all targets of a VeRA share, read from the file or drawn again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import AdapterError, NeedsBaseError
from loratools.families.stated import seed_of, sides_of
from loratools.operators import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.families.base import Settings
    from loratools.storage.base import TensorSpec


@dataclass(frozen=True, eq=False)
class Projections:
    """A (rows, widest input) and B (widest output, rank), or the seed and sizes that they are drawn from.

    `rows` is how many of A there are: a multiple of the rank. `exact`: drawn ones are used as they were drawn, whatever
    the dtype of the base.
    """

    rank: int
    rows: int
    stored: tuple[Tensor, Tensor] | None
    seed: int | None
    largest: tuple[int, int] | None  # (widest output, widest input) of all targets
    exact: bool = False

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], slots: tuple[str, str], rank: int, rows: int, settings: Settings
    ) -> Projections:
        """From the shared tensors where they are there, else from the settings; AdapterError for the wrong rank."""
        if not set(slots) <= set(tensors):
            return cls(rank, rows, None, *draw_of(settings), bool(settings.get("exact", False)))
        a, b = (tensors[slot] for slot in slots)
        if a.ndim != 2 or b.ndim != 2 or len(a) != rows or b.shape[1] != rank:
            raise AdapterError(
                f"{slots[0]} {tuple(a.shape)} and {slots[1]} {tuple(b.shape)} do not fit a rank of {rank}"
            )
        return cls(rank, rows, (a, b), None, None)

    @property
    def settings(self) -> dict[str, Any]:
        """What `of` takes for settings where they are drawn."""
        if self.stored is not None or self.largest is None:
            return {} if self.seed is None else {"seed": self.seed}
        return {"seed": self.seed, "largest": list(self.largest), "exact": self.exact}

    def cut(self, m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A[:, :n] and B[:m], float64, for a base weight of `dtype`."""
        a, b = self.stored or self._drawn(dtype)
        if a.shape[1] < n or len(b) < m:
            raise AdapterError(
                f"the base weight is {(m, n)}, wider than the projections {(len(b), a.shape[1])}; is it the right base?"
            )
        return a[:, :n].double(), b[:m].double()

    def _drawn(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.seed is None or self.largest is None:
            raise NeedsBaseError(
                "its random projections were not saved (save_projection is false), and depend on the base weight's "
                "largest target; load the adapter with the base: --base, or load(..., base=load_base(...))"
            )
        generator = torch.Generator().manual_seed(self.seed)
        drawn = []
        for shape in ((self.rows, self.largest[1]), (self.largest[0], self.rank)):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
            drawn.append(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
        # PEFT keeps them in the dtype of the base
        half = not self.exact and dtype in (torch.float16, torch.bfloat16)
        return (drawn[0].to(dtype), drawn[1].to(dtype)) if half else (drawn[0], drawn[1])


def draw_of(settings: Settings) -> tuple[int | None, tuple[int, int] | None]:
    """Seed and (widest output, widest input) that random matrices are drawn from, None where they are not stated."""
    seed = None if settings.get("seed") is None else seed_of(settings)
    if settings.get("largest") is None:
        return seed, None
    largest = sides_of(settings, "largest")
    if len(largest) != 2:
        raise AdapterError(f"its settings state {list(largest)} for largest, which are not two sizes")
    return seed, (largest[0], largest[1])


def scaled(lambda_b: Tensor, lambda_d: Tensor, a: Tensor, b: Tensor, scale: float) -> LowRank:
    """scale * diag(lambda_b) @ b @ diag(lambda_d) @ a; AdapterError where lambda_b does not fit b."""
    if len(lambda_b) != len(b):
        raise AdapterError(
            f"lambda_b holds {len(lambda_b)} numbers where the base weight has {len(b)} outputs; is it the right base?"
        )
    return LowRank(lambda_b.double().unsqueeze(1) * b, lambda_d.double().unsqueeze(1) * a, scale)


def check_vectors(specs: Mapping[str, TensorSpec]) -> str | None:
    """What is wrong with tensors that should all be vectors, or None."""
    for slot, spec in specs.items():
        if len(spec.shape) != 1 or not spec.numel:
            return f"{slot} {spec.shape} is no vector"
    return None
