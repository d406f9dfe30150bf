"""The best WaveFT at given places: a projection, but for the coefficients whose wavelets the edges of the delta cut.

Wavelets that lie inside are orthonormal. Cut ones are not, and those along one edge overlap with each other alone: on
each row or column inside they make a small system of their own, and those of the corners one together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.linalg.entries import entries_at
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor

_DEPENDENT = 1e-11  # eigenvalues of a Gram matrix, of those of whole wavelets, that count as none


def padded_size(size: int, wavelet: str) -> int:
    """Coefficients along a side: PEFT's pad what the inverse transform cuts off, and are even."""
    import pywt  # takes a tenth of a second

    lost = pywt.Wavelet(wavelet).rec_len - 2
    return int(size + lost + (size + lost) % 2)


def is_known(wavelet: Any) -> bool:
    """Whether PyWavelets has discrete filters of that name."""
    import pywt  # takes a tenth of a second

    return wavelet in pywt.wavelist(kind="discrete")


def best_coefficients(delta: Operator, rows: Tensor, columns: Tensor, wavelet: str) -> Tensor:
    """The coefficients at places (k,) of the padded matrix whose inverse transform is nearest to `delta`, float64.

    Of several such, the shortest. Factors are transformed in place of the delta.
    """
    m, n = delta.shape
    products = _products(delta, rows, columns, wavelet)
    edges = [_edges(size, wavelet) for size in (m, n)]
    at = [_position(places, indices, padded_size(size, wavelet)) for places, (indices, _), size in
          zip((rows, columns), edges, (m, n), strict=True)]  # fmt: skip
    found = products.clone()
    cut = at[0] >= 0, at[1] >= 0
    for axis, lines in ((0, columns), (1, rows)):
        chosen = (cut[axis] & ~cut[1 - axis]).nonzero().flatten()
        if len(chosen):
            found[chosen] = _along_lines(edges[axis][1], at[axis][chosen], lines[chosen], products[chosen])
    corner = (cut[0] & cut[1]).nonzero().flatten()
    if len(corner):
        gram = edges[0][1][at[0][corner]][:, at[0][corner]] * edges[1][1][at[1][corner]][:, at[1][corner]]
        found[corner] = (_inverse(gram.unsqueeze(0))[0] @ products[corner].unsqueeze(1)).squeeze(1)
    return found


def _products(delta: Operator, rows: Tensor, columns: Tensor, wavelet: str) -> Tensor:
    """Inner products of the delta with the wavelets of these places."""
    if isinstance(delta, LowRank):
        left, right = _analysed(delta.left.double(), wavelet), _analysed(delta.right.double().T, wavelet).T
        found: Operator = LowRank(left, right, delta.scale)
    else:
        half = _analysed(delta.to(torch.float64).dense(), wavelet)
        found = Dense(_analysed(half.T, wavelet).T)
    return entries_at(found, rows * found.shape[1] + columns)


def _analysed(x: Tensor, wavelet: str) -> Tensor:
    import pywt

    both = pywt.dwt(x.numpy(), wavelet, mode="zero", axis=0)
    return torch.cat([torch.from_numpy(band) for band in both])


def _edges(size: int, wavelet: str) -> tuple[Tensor, Tensor]:
    """The coefficients along a side whose wavelets may be cut, and the inner products of what is left of these."""
    import pywt

    half, reach = padded_size(size, wavelet) // 2, pywt.Wavelet(wavelet).rec_len // 2 + 1
    near = torch.arange(half)
    ends = near[(near < reach) | (near >= half - reach)]
    indices = torch.cat([ends, half + ends])
    units = torch.zeros(2 * half, len(indices), dtype=torch.float64)
    units[indices, torch.arange(len(indices))] = 1.0
    atoms = pywt.idwt(units[:half].numpy(), units[half:].numpy(), wavelet, mode="zero", axis=0)[:size]
    return indices, torch.from_numpy(atoms.T @ atoms)


def _position(places: Tensor, indices: Tensor, size: int) -> Tensor:
    """Where in `indices` each place is, -1 where it is not."""
    table = torch.full((size,), -1)
    table[indices] = torch.arange(len(indices))
    return table[places]


def _along_lines(gram: Tensor, at: Tensor, lines: Tensor, products: Tensor) -> Tensor:
    """The solutions of the systems of each line: rows `at` of the Gram matrix, as many as it has places."""
    distinct, line = lines.unique(return_inverse=True)
    chosen = torch.zeros(len(distinct), len(gram), dtype=torch.float64)
    chosen[line, at] = 1.0
    wanted = torch.zeros_like(chosen)
    wanted[line, at] = products
    parts = [
        (_inverse(gram * some.unsqueeze(2) * some.unsqueeze(1)) @ right.unsqueeze(2)).squeeze(2)
        for some, right in zip(chosen.split(256), wanted.split(256), strict=True)
    ]
    return torch.cat(parts)[line, at]


def _inverse(grams: Tensor) -> Tensor:
    """Pseudo-inverses of (b, k, k)."""
    return torch.linalg.pinv(grams, atol=_DEPENDENT, rtol=0.0, hermitian=True)
