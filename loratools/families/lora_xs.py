"""LoRA-XS without its bases: delta = U R S V^T, with the leading singular triplets of the base weight."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_matrix
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.linalg.factored import column_signs
from loratools.linalg.krylov import leading_triplets
from loratools.linalg.svd import thin_svd
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_WHOLE_BELOW = 512  # smaller sides are decomposed whole
_NEAR = 1e-9  # of leading vectors to the truth; whatever is not proven to be as near as 100 times that is done whole


@dataclass(frozen=True)
class LoRAXSOptions:
    """`rank`: how many leading triplets of the base weight make the bases."""

    rank: int = 32


@final
@dataclass(frozen=True, eq=False)
class LoRAXS(Fittable):
    """loraxs_R (r, r), and the setting `base`: a digest of the base weight, whose singular vectors are computed again.

    Their signs: the largest entry of each column of U is positive. Equal singular values leave it open which vectors
    are theirs; a base that has such among the first r + 1 decodes as it should on the machine that made it alone.
    """

    family: ClassVar[str] = "lora-xs"
    required: ClassVar[frozenset[str]] = frozenset({"loraxs_R"})
    needs_base: ClassVar[bool] = True
    fits_with_base: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ("loraxs_R",)
    Options: ClassVar[type[LoRAXSOptions]] = LoRAXSOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "U R S V^T, with the leading singular triplets of the base weight"
    count: ClassVar[str] = "r^2"
    paper: ClassVar[str] = "Balazy et al. 2024, arXiv 2405.17604"

    r: Tensor
    base: str | None = None
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> LoRAXS:
        return cls(parameters["loraxs_R"], settings.get("base"), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        shape = specs["loraxs_R"].shape
        return None if len(shape) == 2 and shape[0] == shape[1] > 0 else f"loraxs_R {shape} is no square"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["loraxs_R"].shape[0]

    def parameters(self) -> dict[str, Tensor]:
        return {"loraxs_R": self.r}

    def stated_settings(self) -> dict[str, Any]:
        return {} if self.base is None else {"base": self.base}

    def operator(self, base: Tensor | None = None) -> Operator:
        weight = _Weight.of(base, self.layout)
        if self.base not in (None, weight.digest):
            raise AdapterError("the base weight is not the one whose singular vectors are its bases; pass that base")
        if len(self.r) > min(weight.matrix.shape):
            raise AdapterError(f"the base weight {tuple(weight.matrix.shape)} has no {len(self.r)} singular vectors")
        left, right = bases(weight, len(self.r))
        return LowRank(left @ self.r.double(), right, self.scale)

    @classmethod
    def encode(cls, source: Source, options: LoRAXSOptions) -> LoRAXS:
        """R = U^T delta V S^-1, which is the best one, for U and V are orthonormal.

        Costs the leading triplets of the base weight, and r (m + n) times its rank for a delta of factors.
        """
        if options.rank < 1:
            raise UsageError(f"lora-xs: a rank of {options.rank} leaves no bases")
        weight = _Weight.of(source.base, source.layout)
        left, right = bases(weight, min(options.rank, *source.shape))
        lengths = right.square().sum(1)
        inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
        core = left.T @ source.delta.to(torch.float64).matmat(right.T) * inverse
        return cls(cast_to(core, source.stored), weight.digest, 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> LoRAXSOptions | None:
        rank = min(math.isqrt(nbytes // source.stored.itemsize), *source.shape)
        return LoRAXSOptions(rank) if rank else None

    @classmethod
    def size(cls, source: Source, options: LoRAXSOptions) -> int:
        return min(options.rank, *source.shape) ** 2 * source.stored.itemsize

    @classmethod
    def expected_energy(cls, source: Source, options: LoRAXSOptions) -> float:
        m, n = source.shape
        return min(1.0, options.rank**2 / (m * n))


@dataclass(frozen=True)
class _Weight:
    """A base weight, equal to others of the same numbers."""

    digest: str
    matrix: Tensor = field(compare=False)  # (m, n) float64

    @classmethod
    def of(cls, base: Tensor | None, layout: Layout) -> _Weight:
        """NeedsBaseError where there is none."""
        matrix = base_matrix("LoRA-XS", base, layout).contiguous()
        return cls(hashlib.sha256(matrix.cpu().numpy().tobytes()).hexdigest()[:16], matrix)


@lru_cache(maxsize=2)
def bases(weight: _Weight, rank: int) -> tuple[Tensor, Tensor]:
    """(U (m, r), S V^T (r, n)), float64."""
    if min(weight.matrix.shape) >= max(_WHOLE_BELOW, 8 * rank):
        near = leading_triplets(Dense(weight.matrix), rank, tolerance=_NEAR)
        if bool((near.errors[:rank] <= 100 * _NEAR).all()):
            u, s, vt = near.u[:, :rank], near.s[:rank], near.vt[:rank]
            signs = column_signs(u)
            return u * signs, s.unsqueeze(1) * vt * signs.T
    u, s, vt = thin_svd(Dense(weight.matrix))
    return u[:, :rank].clone(), s[:rank].unsqueeze(1) * vt[:rank]
