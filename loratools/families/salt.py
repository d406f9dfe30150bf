"""SALT: W + delta = U ReLU(S') V^T, leading singular values scaled and shifted, the others with a low-rank block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_matrix
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.linalg.factored import column_signs
from loratools.linalg.svd import truncate
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.storage.base import TensorSpec

_SWEEPS = 3  # of the fit of the block, which the ReLU keeps from being an SVD; on real weights more gain 1e-4


@dataclass(frozen=True)
class SALTOptions:
    """`rank`: of the block of the other singular values, 0 for none; `top`: how many are scaled and shifted, None for
    a tenth of them.
    """

    rank: int = 256
    top: int | None = None


@final
@dataclass(frozen=True, eq=False)
class SALT(Fittable):
    """salt_scale and salt_shift (R,), salt_x (k - R, r) and salt_y (r, k - R), for the k singular values of the base.

    S' is diagonal in its first R rows and columns, scale * S + shift, and diag(S) + X Y in the others, and the ReLU
    clips every entry of it: the decoded block is no product of X and Y. U and V are not stored but computed anew from
    the base in float32: where another library signs a pair of vectors otherwise, X and Y belong to another weight,
    which nothing in a file of the authors can tell. Scale and shift know no signs. A file of loratools' own makes the
    largest entry of every column of U positive.
    """

    family: ClassVar[str] = "salt"
    required: ClassVar[frozenset[str]] = frozenset({"salt_scale", "salt_shift"})
    optional: ClassVar[frozenset[str]] = frozenset({"salt_x", "salt_y"})
    needs_base: ClassVar[bool] = True
    Options: ClassVar[type[SALTOptions]] = SALTOptions
    guarantee: ClassVar[Guarantee] = "local"
    formula: ClassVar[str] = "U (ReLU(S') - S) V^T, where W = U S V^T"
    count: ClassVar[str] = "2 R + 2 r (min(m, n) - R)"
    paper: ClassVar[str] = "SALT, BMVC 2025"
    reconstruction: ClassVar[str] = (
        "the signs of the singular vectors are fixed by their largest entries, where the authors take what the library "
        "gives"
    )
    fits_with_base: ClassVar[bool] = True

    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    layout: Layout = Layout()
    signs_fixed: bool = False

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> SALT:
        return cls(dict(parameters), scale, layout, bool(settings.get("signs_fixed", False)))

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        if any(not spec.numel for spec in specs.values()):
            return "it holds a tensor without numbers"
        scale, shift = specs["salt_scale"].shape, specs["salt_shift"].shape
        if len(scale) != 1 or scale != shift:
            return f"scales {scale} and shifts {shift} are not a number each for the leading singular values"
        if len({"salt_x", "salt_y"} & set(specs)) == 1:
            return "of X and Y one is missing"
        if "salt_x" in specs:
            x, y = specs["salt_x"].shape, specs["salt_y"].shape
            if len(x) != 2 or y != x[::-1]:
                return f"X {x} and Y {y} make no square block"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["salt_x"].shape[1] if "salt_x" in specs else 0

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def stated_settings(self) -> dict[str, Any]:
        return {"signs_fixed": True} if self.signs_fixed else {}

    def operator(self, base: Tensor | None = None) -> Operator:
        """Costs an SVD of the base, and two products with its singular vectors."""
        u, s, vt = decomposed(base_matrix("SALT", base, self.layout), signs_fixed=self.signs_fixed)
        a, b = self.tensors["salt_scale"].double(), self.tensors["salt_shift"].double()
        top = len(a)
        others = self.tensors["salt_x"].shape[0] if "salt_x" in self.tensors else len(s) - top
        if top + others != len(s) or top > len(s):
            raise AdapterError(
                f"it changes {top + others} singular values where the base has {len(s)}; is it the right base?"
            )
        leading = (a * s[:top] + b).clamp(min=0) - s[:top]
        change = LowRank(u[:, :top] * leading, vt[:top], self.scale)
        if "salt_x" not in self.tensors:
            return change
        block = self.tensors["salt_x"].double() @ self.tensors["salt_y"].double()
        rest = _clipped(block, s[top:])
        return Dense((change.left @ change.right + u[:, top:] @ rest @ vt[top:]) * self.scale)

    @classmethod
    def encode(cls, source: Source, options: SALTOptions) -> SALT:
        """Shifts alone for the leading values; for the others the part that no clipping undoes, and its SVD.

        What lies between leading and other vectors, and off the diagonal of the leading ones, has no place. Costs an
        SVD of the base, and three of its block to the rank.
        """
        u, s, vt = decomposed(base_matrix("SALT", source.base, source.layout), signs_fixed=True)
        top = max(1, len(s) // 10) if options.top is None else options.top
        if not 1 <= top <= len(s) or options.rank < 0:
            raise AdapterError(f"of {len(s)} singular values {top} cannot lead, with a block of rank {options.rank}")
        wanted = _coordinates(source.delta, u, vt)  # (k, k)
        shift = (s[:top] + wanted.diagonal()[:top]).clamp(min=0) - s[:top]
        tensors = {"salt_scale": torch.ones(top), "salt_shift": shift}
        rank = min(options.rank, len(s) - top)
        if rank:
            low = _block(wanted[top:, top:], s[top:], rank, source.seed)
            tensors |= {"salt_x": low.left, "salt_y": low.right}
        stored = {slot: cast_to(tensor, source.stored) for slot, tensor in tensors.items()}
        return cls(stored, 1.0, source.layout, signs_fixed=True)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> SALTOptions | None:
        k, item = min(source.shape), source.stored.itemsize
        top = max(1, k // 10)
        if nbytes < 2 * top * item:
            return None
        return SALTOptions(min((nbytes // item - 2 * top) // (2 * (k - top)), k - top) if k > top else 0, top)

    @classmethod
    def size(cls, source: Source, options: SALTOptions) -> int:
        k = min(source.shape)
        top = max(1, k // 10) if options.top is None else options.top
        return (2 * top + 2 * min(options.rank, k - top) * (k - top)) * source.stored.itemsize


def decomposed(weight: Tensor, *, signs_fixed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of the base as the authors take it, in float32, given in float64."""
    u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    if signs_fixed:
        signs = column_signs(u)
        u, vt = u * signs, vt * signs.T
    return u.double(), s.double(), vt.double()


def _coordinates(delta: Operator, u: Tensor, vt: Tensor) -> Tensor:
    """U^T delta V."""
    if isinstance(delta, LowRank):
        return (u.T @ delta.left.double()) @ (delta.right.double() @ vt.T) * delta.scale
    return u.T @ delta.to(torch.float64).matmat(vt.T)


def _clipped(block: Tensor, s: Tensor) -> Tensor:
    """ReLU(diag(s) + block) - diag(s)."""
    return (block + torch.diag(s)).clamp(min=0) - torch.diag(s)


def _block(wanted: Tensor, s: Tensor, rank: int, seed: int) -> LowRank:
    """The product that comes nearest to `wanted` once clipped, of those that were tried; zeros, where none is nearer.

    An entry that is to be 0 may be anything below: each step asks there for no more than the last one gave.
    """
    k = len(s)
    reachable = _clipped(wanted, s)
    at_zero = reachable + torch.diag(s) == 0
    best = LowRank(torch.zeros(k, rank, dtype=torch.float64), torch.zeros(rank, k, dtype=torch.float64))
    least, asked = float(wanted.norm()), reachable
    for _ in range(_SWEEPS):
        found = truncate(Dense(asked), rank, seed=seed).operator
        assert isinstance(found, LowRank)
        product = found.dense()
        error = float((_clipped(product, s) - wanted).norm())
        if error < least:
            best, least = found, error
        below = at_zero & (product + torch.diag(s) < 0)
        asked = torch.where(below, product, reachable)
    return best
