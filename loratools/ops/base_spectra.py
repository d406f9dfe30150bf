"""What is known of the singular vectors of one base weight: found once, for all that is compared with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from loratools._lazy import torch
from loratools.cache import Cache, content_key
from loratools.linalg.basis import Basis, decomposed, is_basis_of
from loratools.linalg.krylov import Krylov, Leading, leading_of
from loratools.operators import Dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SMALL = 1024  # a shorter side below this: decomposed whole in a second or less
_ROUNDING = 16  # units of precision, relative to the Frobenius norm, that a factorisation may be off
_TAME = (1e-6, 1e6)  # largest entries of a weight that need no scaling
_ROUGH = 3e-2  # of those by which others are found
TOLERANCE = 1e-3  # of leading vectors found by products; what is proven with them allows for it
_IN_DOUBLE = 256  # a shorter side up to this: in float64 from the start


Method = Literal["auto", "dense", "certified"]


@dataclass(frozen=True)
class Search:
    """How the singular vectors of base weights are had.

    `method` "dense" decomposes each weight whole; "certified" decides by proven bounds and decomposes only where they
    leave something open; "auto" does so for large weights whose vectors are not in `cache`, where they are kept.
    """

    method: Method = "auto"
    cache: Cache | None = None
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Square:
    """A tall weight, or the transpose of a wide one, as Q R.

    `leak`: how far out of the span of Q rounding may have put a left singular vector.
    """

    q: Tensor  # (long, p)
    r: Tensor  # (p, p)
    leak: float


class BaseSpectrum:
    """Lazily, the whole basis of a weight (m, n), its leading triplets with proven errors, and its square factors.

    A whole basis is taken from the cache of `search` and kept there.
    """

    def __init__(self, parameter: str, weight: Tensor, search: Search = Search()) -> None:
        self.parameter = parameter
        self.stored = weight
        self._cache, self._device = search.cache, search.device
        self._method = search.method
        self._bases: dict[torch.dtype, Basis] = {}
        self._squares: dict[bool, Square] = {}
        self._run: tuple[int, Krylov] | None = None

    @cached_property
    def scale(self) -> float:
        """1, or the power of two that brings the largest entry of an extreme weight to about 1: no square overflows."""
        least, most = (float(x) for x in torch.aminmax(self.stored)) if self.stored.numel() else (0.0, 0.0)
        largest = max(-least, most)
        return 1.0 if largest == 0 or _TAME[0] < largest < _TAME[1] else 2.0 ** math.frexp(largest)[1]

    @cached_property
    def weight(self) -> Tensor:
        """(m, n), over `scale`, in the dtype that its basis is found in first: float64 where that costs nothing."""
        double = min(self.stored.shape) <= _IN_DOUBLE or self.stored.dtype == torch.float64
        return self.weight_in(torch.float64 if double else torch.float32)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """As `weight`, in another dtype, from what is stored."""
        stored = self.stored if self.scale == 1 else self.stored.double() / self.scale
        return stored.to(device=self._device, dtype=dtype)

    @property
    def wants_basis(self) -> bool:
        """Whether the whole basis is to be had at once: by choice, or because it costs less than avoiding it."""
        if self._method != "auto":
            return self._method == "dense" or bool(self._bases)
        return min(self.stored.shape) < SMALL or self.known_basis() is not None

    def known_basis(self) -> Basis | None:
        """The whole basis of the scaled weight where it is at hand: computed before, or in the cache."""
        if self._bases:
            return self._bases.get(self.weight.dtype) or next(iter(self._bases.values()))
        kept = None if self._cache is None else self._cache.read(self._key)
        if kept is None or set(kept) != {"u", "s", "vt"}:
            return None
        basis = Basis(*(kept[name].to(self.weight) for name in ("u", "s", "vt")))
        if not is_basis_of(basis, self.weight):
            return None
        self._bases[self.weight.dtype] = basis
        return basis

    def basis(self, dtype: torch.dtype) -> Basis:
        """The whole basis of the scaled weight, by a dense SVD where it is not known.

        That in the dtype of `weight` is kept in the cache.
        """
        is_first = dtype == self.weight.dtype
        if is_first:
            self.known_basis()
        if dtype in self._bases:
            return self._bases[dtype]
        basis = self._bases[dtype] = decomposed(self.weight_in(dtype))
        if self._cache is not None and is_first:
            tensors = {"u": basis.u, "s": basis.s, "vt": basis.vt}
            self._cache.write(self._key, {k: t.cpu().contiguous() for k, t in tensors.items()}, name=self.parameter)
        return basis

    def leading(self, count: int, *, prove: Sequence[int] = (), tolerance: float = _ROUGH) -> Leading:
        """More than `count` triplets of the scaled weight, where it has so many.

        Out of the basis where that is known, else by products, within `tolerance`. With `prove`, errors are proven for
        as many as could be: those at its indices, unless that cannot be done.
        """
        if (basis := self.known_basis()) is not None:
            return leading_of(basis.u, basis.s.double(), basis.vt, count + 1)
        if self._run is None or self._run[0] < count:
            self._run = count, Krylov(Dense(self.weight), count)
        run = self._run[1]
        return run.leading(prove or range(count), TOLERANCE if prove else tolerance, proven=bool(prove))

    def square(self, *, left: bool) -> Square:
        """Of the longer side, by Householder's QR, whose Q is orthonormal whatever the weight is."""
        if left not in self._squares:
            q, r = torch.linalg.qr(self.weight if left else self.weight.T)
            self._squares[left] = Square(q, r, leak(float(r.norm()), _least_singular_value(r), r.dtype))
        return self._squares[left]

    @cached_property
    def _key(self) -> str:
        return content_key(self.stored, f"scaled basis in {self.weight.dtype}")


def leak(norm: float, least: float, dtype: torch.dtype) -> float:
    """By how much rounding may turn a left singular vector out of the column space, by its least singular value."""
    return min(1.0, _ROUNDING * torch.finfo(dtype).eps * norm / least) if least > 0 else 1.0


def _least_singular_value(triangle: Tensor) -> float:
    """Half of an estimate from above: by iteration with a random block, which is hardly ever off by more."""
    x = torch.randn(triangle.shape[0], 8, generator=torch.Generator().manual_seed(0)).to(triangle)
    largest = 0.0
    for _ in range(4):
        x = torch.linalg.solve_triangular(triangle.T, torch.linalg.qr(x)[0], upper=False)
        x = torch.linalg.solve_triangular(triangle, x, upper=True)
        if not bool(torch.isfinite(x).all()):
            return 0.0
        largest = float(torch.linalg.matrix_norm(x, 2))
    return 0.5 / math.sqrt(largest) if largest else 0.0
