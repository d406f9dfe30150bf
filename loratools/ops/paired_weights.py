"""The weights of two base models side by side, as matrices with norms and singular vectors."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from loratools.errors import AdapterError
from loratools.ops.base_spectra import BaseSpectrum, Search

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.linalg.basis import Basis


class PairedWeights:
    """The weights of two models, of which two and one are held at a time."""

    def __init__(self, adapter: Adapter, source: BaseWeights, destination: BaseWeights, search: Search) -> None:
        self._adapter, self._source, self._destination, self._search = adapter, source, destination, search
        self._before_of = lru_cache(maxsize=2)(self._read_before)  # between layers, two are needed in turn
        self._after_of = lru_cache(maxsize=1)(self._read_after)

    def before(self, target: str) -> Weight:
        """That of the adapter's own model which a target changes."""
        return self._before_of(target)

    def after(self, module: str, target: str) -> Weight:
        """That of a module of the other model, laid out as `target` says."""
        return self._after_of(module, target)

    def _read_before(self, target: str) -> Weight:
        return self._of(self._source, self._adapter.format.parameter(target), target)

    def _read_after(self, module: str, target: str) -> Weight:
        return self._of(self._destination, f"{module}.weight", target)

    def _of(self, base: BaseWeights, parameter: str, target: str) -> Weight:
        stored = base.find(parameter, None)
        if not stored.is_floating_point():
            raise AdapterError(f"{parameter} is held as {stored.dtype}; give weights of 16 or 32 bits")
        matrix = stored.T if self._adapter.entries[target].layout.transposed else stored
        return Weight(parameter, matrix, self._search)


class Weight:
    """One weight as an (m, n) matrix, its Frobenius norm, and its singular vectors once they are asked for."""

    def __init__(self, parameter: str, matrix: Tensor, search: Search) -> None:
        self.matrix = matrix
        self.norm = float(matrix.double().norm())
        self._spectrum = BaseSpectrum(parameter, matrix, search) if matrix.ndim == 2 else None
        self._basis: Basis | None = None

    def basis(self) -> Basis:
        """All singular vectors; out of the cache of the search where they are kept there."""
        assert self._spectrum is not None  # only matrices get so far
        if self._basis is None:
            self._basis = self._spectrum.basis(self._spectrum.weight.dtype)
        return self._basis
