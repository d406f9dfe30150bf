"""LoRA-XS and LoRA-SB with their bases: delta = scale * B R A, of which R alone was trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.linalg.svd import truncate
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@dataclass(frozen=True)
class LatentLoRAOptions:
    """`rank`: of the bases; None for the rank that the delta has."""

    rank: int | None = None


@final
@dataclass(frozen=True, eq=False)
class LatentLoRA(Fittable):
    """latent_A (r, n), latent_B (m, r) and latent_R (r, r).

    LoRA-XS takes A = S V^T and B = U from the base weight, LoRA-SB orthonormal A and B from a first gradient; what is
    made here has the delta's own singular vectors for B and A and its singular values on the diagonal of R, as LoRA-SB
    begins with the delta that its first gradient asks for.
    """

    family: ClassVar[str] = "latent_lora"
    required: ClassVar[frozenset[str]] = frozenset({"latent_A", "latent_B", "latent_R"})
    scaled: ClassVar[tuple[str, ...]] = ("latent_R",)
    Options: ClassVar[type[LatentLoRAOptions]] = LatentLoRAOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "B R A, with orthonormal B and A"
    count: ClassVar[str] = "r (m + n) + r^2, of which LoRA-SB trains r^2"
    paper: ClassVar[str] = "LoRA-SB, arXiv 2411.19557; LoRA-XS, arXiv 2405.17604"

    a: Tensor
    b: Tensor
    r: Tensor
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> LatentLoRA:
        return cls(parameters["latent_A"], parameters["latent_B"], parameters["latent_R"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        a, b, r = (specs[f"latent_{part}"].shape for part in "ABR")
        fits = len(a) == len(b) == len(r) == 2 and 0 not in a + b + r and r == (b[1], a[0])
        return None if fits else f"B {b}, R {r} and A {a} do not chain"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["latent_R"].shape[0]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        shape = (specs["latent_B"].shape[0], specs["latent_A"].shape[1])
        return layout.shape or (shape[::-1] if layout.transposed else shape)

    def parameters(self) -> dict[str, Tensor]:
        return {"latent_A": self.a, "latent_B": self.b, "latent_R": self.r}

    def operator(self, base: Tensor | None = None) -> Operator:
        return LowRank(self.b.double() @ self.r.double(), self.a.double(), self.scale)

    @classmethod
    def encode(cls, source: Source, options: LatentLoRAOptions) -> LatentLoRA:
        rank, delta = options.rank, source.delta
        if rank is None:
            if not isinstance(delta, LowRank):
                raise AdapterError("the delta is no product of factors; say of which rank it should become: rank=N")
            rank = delta.rank
        best = truncate(delta, min(rank, *source.shape), seed=source.seed)
        assert isinstance(best.operator, LowRank)
        values = best.spectra[0][: best.operator.rank]
        inverse = torch.where(values > 0, values.rsqrt(), 0.0)  # the factors are balanced
        return cls(
            cast_to(best.operator.right * inverse.unsqueeze(1), source.stored),
            cast_to(best.operator.left * inverse, source.stored),
            cast_to(torch.diag(values), source.stored),
            1.0,
            source.layout,
        )

    @classmethod
    def within(cls, source: Source, nbytes: int) -> LatentLoRAOptions | None:
        (m, n), numbers = source.shape, nbytes // source.stored.itemsize
        rank = min((math.isqrt((m + n) ** 2 + 4 * numbers) - (m + n)) // 2, m, n)  # r (m + n) + r^2 <= numbers
        return LatentLoRAOptions(rank) if rank > 0 else None

    @classmethod
    def size(cls, source: Source, options: LatentLoRAOptions) -> int:
        (m, n), rank = source.shape, min(options.rank or source.rank, source.rank)
        return rank * (m + n + rank) * source.stored.itemsize
