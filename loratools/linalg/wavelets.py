"""Orthogonal wavelet transforms of matrices of any size, periodised, with PyWavelets' filters and its conventions.

Where a length is odd, its last number goes into the approximation as it is: the transform stays orthogonal, nothing is
padded, and nothing has to be cut off again. At even lengths the bands are those of `pywt.dwt(..., "periodization")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.linalg.wavelet_planes import PAIRS, fits, transformed
from loratools.operators import Dense, LowRank, Operator, Transform

if TYPE_CHECKING:
    from torch import Tensor

_ORTHONORMAL = 1e-9  # how far shifted filters may be from it
_PAIRS = 16  # of coefficients that one small matrix makes


@lru_cache(maxsize=64)
def filters(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(low, high) analysis filters; UsageError for what is no orthogonal wavelet of PyWavelets."""
    import pywt  # takes a tenth of a second

    known = pywt.wavelist(kind="discrete")
    if name not in known or not _is_orthonormal(pywt.Wavelet(name)):
        fits = [w for w in known if _is_orthonormal(pywt.Wavelet(w))]
        raise UsageError(f"the wavelet {name!r} is no orthogonal one; there are: {', '.join(fits)}")
    wavelet = pywt.Wavelet(name)
    return tuple(wavelet.dec_lo), tuple(wavelet.dec_hi)


def _is_orthonormal(wavelet: Any) -> bool:
    if not wavelet.orthogonal:
        return False
    low = wavelet.dec_lo
    products = [
        sum(a * b for a, b in zip(low[shift:], low, strict=False)) - (shift == 0) for shift in range(0, len(low), 2)
    ]
    return max(map(abs, products)) < _ORTHONORMAL


def halved(size: int) -> tuple[int, int]:
    """How many numbers the approximation and the details have, of `size`."""
    return size - size // 2, size // 2


def split(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(approximation, details) of the columns of x (size, c), one level."""
    size = len(x)
    details = size // 2
    if not details:
        return x, x[:0]
    pairs = _block(details)
    low, high, window = _analysis(name, pairs)
    windows = _windows(x, 2 * pairs, window, len(low[0]), 2 * details)  # (blocks, window, c)
    matrix = torch.stack([low, high]).to(x).reshape(2 * pairs, -1)
    both = torch.matmul(matrix, windows)  # (blocks, 2 pairs, c)
    approximation, detail = both[:, :pairs].reshape(details, -1), both[:, pairs:].reshape(details, -1)
    return (torch.cat([approximation, x[-1:]]) if size % 2 else approximation), detail


def joined(approximation: Tensor, detail: Tensor, name: str) -> Tensor:
    """What `split` took apart: its inverse, and its transpose."""
    details = len(detail)
    if not details:
        return approximation
    pairs = _block(details)
    matrix, window, start = _synthesis(name, pairs)
    parts = [_windows(c[:details], pairs, start, window, details) for c in (approximation, detail)]
    whole = torch.matmul(matrix.to(detail), torch.cat(parts, dim=1)).reshape(2 * details, -1)
    return torch.cat([whole, approximation[details:]]) if len(approximation) > details else whole


def _block(details: int) -> int:
    """The most pairs, up to `_PAIRS`, that divide so many."""
    return next(p for p in range(min(_PAIRS, details), 0, -1) if details % p == 0)


def _windows(x: Tensor, step: int, start: int, window: int, size: int) -> Tensor:
    """(size / step, window, c): the rows from k step + start on, of the first `size`, which repeat."""
    blocks = size // step
    first = torch.arange(0, size, step, device=x.device)
    places = (first[:, None] + torch.arange(start, start + window, device=x.device)) % size
    if window == step and start == 0:
        return x[:size].reshape(blocks, window, -1)
    return x[places]


@lru_cache(maxsize=64)
def _analysis(name: str, pairs: int) -> tuple[Tensor, Tensor, int]:
    """Matrices (pairs, window) for a block of so many coefficients of either band, and where its window starts."""
    length = len(filters(name)[0])
    reach = length // 2 - 1  # numbers before the block that it depends on, and after it
    found = torch.zeros(2, pairs, 2 * pairs + 2 * reach, dtype=torch.float64)
    for band, taps in enumerate(filters(name)):
        for k in range(pairs):
            for j, tap in enumerate(taps):
                found[band, k, 2 * k + length // 2 - j + reach] += tap
    return found[0], found[1], -reach


@lru_cache(maxsize=64)
def _synthesis(name: str, pairs: int) -> tuple[Tensor, int, int]:
    """The matrix (2 pairs, 2 window) that makes a block from windows of both bands, their width, and their start."""
    length = len(filters(name)[0])
    reach = length // 4
    window = pairs + 2 * reach
    found = torch.zeros(2 * pairs, 2, window, dtype=torch.float64)
    for band, taps in enumerate(filters(name)):
        for i in range(2 * pairs):
            for at in range(window):
                j = 2 * (at - reach) + length // 2 - i
                if 0 <= j < length:
                    found[i, band, at] = taps[j]
    return found.reshape(2 * pairs, 2 * window), window, -reach


@final
@dataclass(frozen=True)
class Wavelet(Transform):
    """The approximation that is left after `level` - 1 levels, split once more: an isometry, orthogonal at level 1."""

    name: str
    length: int
    level: int = 1

    @property
    def size(self) -> int:
        return self.length

    @property
    def count(self) -> int:
        size = self.length
        for _ in range(self.level - 1):
            size = halved(size)[0]
        return size

    def analyse(self, x: Tensor) -> Tensor:
        for _ in range(self.level - 1):
            x = split(x, self.name)[0]
        return torch.cat(split(x, self.name))

    def synthesise(self, coefficients: Tensor) -> Tensor:
        sizes = [self.length]
        for _ in range(self.level - 1):
            sizes.append(halved(sizes[-1])[0])
        near = halved(sizes[-1])[0]
        x = joined(coefficients[:near], coefficients[near:], self.name)
        for size in reversed(sizes[:-1]):
            x = joined(x, x.new_zeros(size // 2, x.shape[1]), self.name)
        return x


@dataclass(frozen=True)
class Band:
    """One sub-band of a matrix: its level, whether it holds details of rows and of columns, and where it lies.

    Places are those of PyWavelets' `coeffs_to_array`: approximations first, those of the last level in the corner.
    """

    level: int
    details: tuple[bool, bool]
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def bands_of(shape: tuple[int, int], levels: int) -> list[Band]:
    """All sub-bands, the coarsest first: each level takes the approximation apart, of rows and of columns.

    AdapterError for a matrix that has not so many levels.
    """
    m, n = shape
    found: list[Band] = []
    for level in range(1, levels + 1):
        if min(m, n) < 2:
            raise AdapterError(f"a {shape[0]} x {shape[1]} matrix has {level - 1} levels of wavelets, not {levels}")
        sides = [((False, slice(0, halved(size)[0])), (True, slice(halved(size)[0], size))) for size in (m, n)]
        four = [Band(level, (i, j), rows, columns) for i, rows in sides[0] for j, columns in sides[1]]
        found = [*(four if level == levels else four[1:]), *found]
        m, n = halved(m)[0], halved(n)[0]
    return found


def coefficients(op: Operator, name: str, levels: int) -> list[tuple[Band, Operator]]:
    """Every sub-band of a matrix: low rank where it is, of its factors' transforms, else dense; float64."""
    found = bands_of(op.shape, levels)
    if isinstance(op, LowRank):
        lefts = _pyramid(op.left.double() * op.scale, name, levels)
        rights = _pyramid(op.right.double().T, name, levels)
        return [(b, LowRank(lefts[b.level - 1][b.details[0]], rights[b.level - 1][b.details[1]].T)) for b in found]
    dense = decomposed(op.to(torch.float64).dense(), name, levels)
    return [(b, Dense(dense[b.rows, b.columns])) for b in found]


def _pyramid(x: Tensor, name: str, levels: int) -> list[tuple[Tensor, Tensor]]:
    """(approximation, details) of columns, level by level."""
    found = []
    for _ in range(levels):
        found.append(split(x, name))
        x = found[-1][0]
    return found


def spread(part: Tensor, size: int, name: str, level: int, *, details: bool) -> Tensor:
    """The (size, c) columns that have these coefficients in one band, and none elsewhere."""
    sizes = [size]
    for _ in range(level - 1):
        sizes.append(halved(sizes[-1])[0])
    near = halved(sizes[-1])[0]
    x = joined(part.new_zeros(near, part.shape[1]), part, name) if details else part
    for length in reversed(sizes[:-1] if details else sizes):
        x = joined(x, x.new_zeros(length // 2, x.shape[1]), name)
    return x


def decomposed(x: Tensor, name: str, levels: int, *, out: Tensor | None = None) -> Tensor:
    """The coefficients of a matrix (m, n), where its bands lie; `out`, contiguous, is another matrix."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    source = x.contiguous()
    m, n = x.shape
    reach = len(filters(name)[0]) // 2 - 1
    for level in range(levels):
        if fits((m, n)) and 2 * reach <= min(m, n) and x.dtype.is_floating_point:
            low, high, _ = _analysis(name, PAIRS)
            transformed(source, torch.cat([low, high]).to(x), reach, out[:m, :n])
        else:
            half = torch.cat(split(source, name))
            out[:m, :n] = torch.cat(split(half.T, name)).T
        m, n = halved(m)[0], halved(n)[0]
        source = out[:m, :n].contiguous() if level < levels - 1 else source
    return out
