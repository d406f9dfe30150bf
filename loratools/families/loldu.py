"""LoLDU: delta = scale * P L_r diag(z - d_r) U_r, a change of the first pivots of the base weight (2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_matrix
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.stated import number_of
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.storage.base import TensorSpec

_PLAUSIBLE = 0.5  # cosine between trained and untrained pivots below which the factorisation is another one
_SAME = 1e-3  # relative difference of the pivots' norm above which the base is another one
_GONE = 1e-12  # of the largest eigenvalue: directions that the atoms do not span


@dataclass(frozen=True)
class LoLDUOptions:
    """`rank`: how many of the first pivots are changed; None for all that there are, min(m, n)."""

    rank: int | None = None


@final
@dataclass(frozen=True, eq=False)
class LoLDU(Fittable):
    """loldu_z (r,): the first r pivots as trained. The base weight is P L diag(d) U by elimination in float32.

    L is unit lower and U unit upper triangular, rows are exchanged for the largest pivot, and nothing but z is stored:
    another base, or another order of rows, makes noise of it. A file of the authors is refused where z and d do not
    correlate, one of loratools' own where the norm of d is not the one stated. A fit loses nearly all of a delta that
    was not trained so: it has r numbers for m n.
    """

    family: ClassVar[str] = "loldu"
    required: ClassVar[frozenset[str]] = frozenset({"loldu_z"})
    needs_base: ClassVar[bool] = True
    Options: ClassVar[type[LoLDUOptions]] = LoLDUOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "P L_r diag(z - d_r) U_r, where W = P L diag(d) U"
    count: ClassVar[str] = "r"
    paper: ClassVar[str] = "LoLDU 2024, arXiv 2410.13618"
    fits_with_base: ClassVar[bool] = True

    z: Tensor
    scale: float
    layout: Layout = Layout()
    pivot_norm: float | None = None  # of d_r, where the file states it

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> LoLDU:
        return cls(parameters["loldu_z"], scale, layout, number_of(settings, "pivot_norm"))

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        spec = specs["loldu_z"]
        if len(spec.shape) != 1 or not spec.numel or not spec.dtype.startswith(("F", "BF")):
            return f"pivots of shape {spec.shape} are no vector of numbers"
        if layout.embedding or layout.experts > 1:
            return "the authors' own code does not hold together for embeddings, and a stack has no factorisation"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["loldu_z"].shape[0]

    def parameters(self) -> dict[str, Tensor]:
        return {"loldu_z": self.z}

    def stated_settings(self) -> dict[str, Any]:
        return {} if self.pivot_norm is None else {"pivot_norm": self.pivot_norm}

    def operator(self, base: Tensor | None = None) -> Operator:
        left, pivots, right = eliminated(base_matrix("LoLDU", base, self.layout), len(self.z))
        z = self.z.double()
        self._check_pivots(z, pivots)
        return LowRank(left * (z - pivots), right, self.scale)

    def _check_pivots(self, z: Tensor, pivots: Tensor) -> None:
        norm = float(pivots.norm())
        if self.pivot_norm is not None:
            if not math.isclose(norm, self.pivot_norm, rel_tol=_SAME):
                raise AdapterError(
                    f"the first {len(z)} pivots of the base have the norm {norm:g}, where it was fitted to ones of "
                    f"{self.pivot_norm:g}; is it the right base?"
                )
            return
        cosine = float(z @ pivots) / (norm * float(z.norm()) or 1.0)
        if cosine < _PLAUSIBLE:
            raise AdapterError(
                f"its numbers and the first {len(z)} pivots of the base have the cosine {cosine:.2f}, where training "
                "leaves them near 1: another base, other pivots than the trainer's, or an initialisation other than "
                "'lu'; it cannot be decoded"
            )

    @classmethod
    def encode(cls, source: Source, options: LoLDUOptions) -> LoLDU:
        """Least squares of the change of the pivots; costs r^2 (m + n), and the eigenvalues of an (r, r) matrix."""
        weight = base_matrix("LoLDU", source.base, source.layout)
        rank = min(weight.shape) if options.rank is None else min(options.rank, *weight.shape)
        if rank < 1:
            raise AdapterError(f"a rank of {rank} changes no pivot")
        left, pivots, right = eliminated(weight, rank)
        gram = (left.T @ left) * (right @ right.T)  # of the atoms, left[:, i] times right[i]
        if isinstance(source.delta, LowRank):
            factors = source.delta.left.double().T @ left, right @ source.delta.right.double().T
            inner = (factors[0].T * factors[1]).sum(dim=1) * source.delta.scale
        else:
            inner = (left * source.delta.to(torch.float64).matmat(right.T)).sum(dim=0)
        # Narrower numbers would round away the change of a pivot, which is small beside the pivot itself; even these
        # may round it to something worse than no change at all, for the atoms of a small pivot are large.
        stored = source.stored if source.stored.itemsize >= 4 else torch.float32
        z = cast_to(pivots + _solved(gram, inner), stored)
        change = z.double() - pivots
        if float(change @ (gram @ change) - 2 * change @ inner) > 0:
            z = cast_to(pivots, stored)
        return cls(z, 1.0, source.layout, float(pivots.norm()))

    @classmethod
    def within(cls, source: Source, nbytes: int) -> LoLDUOptions | None:
        rank = min(nbytes // max(4, source.stored.itemsize), *source.shape)
        return LoLDUOptions(rank) if rank else None

    @classmethod
    def size(cls, source: Source, options: LoLDUOptions) -> int:
        return min(options.rank or min(source.shape), *source.shape) * max(4, source.stored.itemsize)

    @classmethod
    def expected_energy(cls, source: Source, options: LoLDUOptions) -> float | None:
        m, n = source.shape
        return min(m, n, options.rank or m) / (m * n)


def eliminated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(P L[:, :rank] (m, r), d[:rank] (r,), U[:rank] (r, n)) of P L diag(d) U, computed in float32, given in float64.

    AdapterError for more pivots than there are, and where one of them is 0: the authors divide by it.
    """
    m, n = weight.shape
    if rank > min(m, n):
        raise AdapterError(f"{rank} numbers for the {min(m, n)} pivots of a {m} x {n} base; is it the right base?")
    packed, exchanges, _ = torch.linalg.lu_factor_ex(weight.float())
    upper = packed[:rank].triu().double()
    pivots = upper.diagonal().clone()
    if bool((pivots == 0).any()):
        raise AdapterError(f"pivot {int((pivots == 0).nonzero()[0])} of the base is 0, and LoLDU divides by it")
    order = list(range(m))
    for i, j in enumerate((exchanges - 1).tolist()):
        order[i], order[j] = order[j], order[i]
    lower = packed[:, :rank].tril(-1).double()
    lower[range(rank), range(rank)] = 1.0
    permuted = torch.empty_like(lower)
    permuted[order] = lower
    return permuted, pivots, upper / pivots.unsqueeze(1)


def _solved(gram: Tensor, inner: Tensor) -> Tensor:
    """The least solution of gram @ x = inner, for a positive semidefinite matrix that may be singular."""
    values, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(values > _GONE * values[-1], 1 / values, 0.0)
    return vectors @ (inverse * (vectors.T @ inner))
