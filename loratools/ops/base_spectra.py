"""What is known of the singular vectors of one base weight: found once, for all that is compared with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from loratools._lazy import torch
from loratools.cache import Cache, content_key
from loratools.linalg.basis import Basis, decomposed, is_basis_of
from loratools.linalg.krylov import Krylov, Leading
from loratools.operators import Dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SMALL = 1024  # a shorter side below this: decomposed whole in a second or less
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
        self._factors: dict[bool, Tensor | None] = {}
        self._run: tuple[int, Krylov] | None = None

    @cached_property
    def weight(self) -> Tensor:
        """(m, n) in the dtype that its basis is found in first: float64 where that costs nothing, else float32."""
        small = min(self.stored.shape) <= _IN_DOUBLE
        return self.stored.to(device=self._device, dtype=torch.float64 if small else torch.float32)

    @property
    def wants_basis(self) -> bool:
        """Whether the whole basis is to be had at once: by choice, or because it costs less than avoiding it."""
        if self._method != "auto":
            return self._method == "dense"
        return min(self.stored.shape) < SMALL or self.known_basis() is not None

    def known_basis(self) -> Basis | None:
        """The whole basis where it is at hand: computed before, or in the cache."""
        if self.weight.dtype in self._bases:
            return self._bases[self.weight.dtype]
        kept = None if self._cache is None else self._cache.read(self._key)
        if kept is None or set(kept) != {"u", "s", "vt"}:
            return None
        basis = Basis(*(kept[name].to(self.weight) for name in ("u", "s", "vt")))
        if not is_basis_of(basis, self.weight):
            return None
        self._bases[self.weight.dtype] = basis
        return basis

    def basis(self, dtype: torch.dtype | None = None) -> Basis:
        """The whole basis, by a dense SVD where it is not known; kept in the cache, unless it is in another dtype."""
        wanted = self.weight.dtype if dtype is None else dtype
        if wanted in self._bases:
            return self._bases[wanted]
        if wanted == self.weight.dtype and (known := self.known_basis()) is not None:
            return known
        basis = decomposed(self.weight.to(wanted))
        self._bases[wanted] = basis
        if self._cache is not None and wanted == self.weight.dtype:
            tensors = {"u": basis.u, "s": basis.s, "vt": basis.vt}
            self._cache.write(self._key, {k: t.cpu().contiguous() for k, t in tensors.items()}, name=self.parameter)
        return basis

    def leading(self, count: int, *, prove: Sequence[int] = (), tolerance: float = _ROUGH) -> Leading:
        """`count` triplets or more: out of the basis where that is known, else by products, within `tolerance`.

        With `prove`, errors are proven for as many as could be: those at its indices, unless that cannot be done.
        """
        if (basis := self.known_basis()) is not None:
            kept = min(count, len(basis.s))
            errors = torch.zeros(kept, dtype=torch.float64)
            upper = tuple(torch.nn.functional.pad(basis.s, (0, 1))[: kept + 1].tolist())
            return Leading(basis.u[:, :kept], basis.s[:kept].double(), basis.vt[:kept], errors, upper)
        if self._run is None or self._run[0] < count:
            self._run = count, Krylov(Dense(self.weight), count)
        run = self._run[1]
        return run.leading(prove or range(count), TOLERANCE if prove else tolerance, proven=bool(prove))

    def square_factor(self, *, left: bool) -> Tensor | None:
        """For the side that is longer than the other, the (p, p) triangle R with the weight, or its transpose, = Q R.

        By Cholesky of the smaller Gram matrix, in float64; None where that is singular to working precision.
        """
        if left not in self._factors:
            tall = (self.weight if left else self.weight.T).double()
            factor, info = torch.linalg.cholesky_ex(tall.T @ tall, upper=True)
            pivots = factor.diagonal()
            sound = int(info) == 0 and bool(pivots.min() > 1e-6 * pivots.max())
            self._factors[left] = factor if sound else None
        return self._factors[left]

    @cached_property
    def _key(self) -> str:
        return content_key(self.stored, f"basis in {self.weight.dtype}")
