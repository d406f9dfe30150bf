"""One level of a matrix's wavelet transform, both sides at once, in one pass through memory.

A few rows are transformed along the columns into a buffer that stays in the cache, wrapped around at its ends, then
along the rows by small matrices, and written to the four bands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

PAIRS = 16  # of coefficients that one small matrix makes: more is more arithmetic, fewer are more calls


def fits(shape: tuple[int, int]) -> bool:
    """Whether a matrix is made of whole blocks."""
    return shape[0] % (2 * PAIRS) == shape[1] % (2 * PAIRS) == 0


def transformed(x: Tensor, band: Tensor, reach: int, out: Tensor) -> None:
    """out = the four bands of x, both (m, n) of one dtype and made of whole blocks; rows of x and out contiguous.

    `band` (2 PAIRS, 2 PAIRS + 2 reach) makes a block's approximations, then its details, from the numbers of the block
    and `reach` of them on either side.
    """
    m, n = x.shape
    pairs, blocks, width = PAIRS, n // (2 * PAIRS), band.shape[1]
    padded = x.new_empty(2 * pairs, n + 2 * reach)
    middle = padded[:, reach : reach + n]
    windows = padded.as_strided((blocks, 2 * pairs, width), (2 * pairs, n + 2 * reach, 1))
    across = band.T.contiguous().expand(blocks, width, 2 * pairs)
    made = x.new_empty(blocks, 2 * pairs, 2 * pairs)
    by_band = made.view(blocks, 2, pairs, 2, pairs).permute(1, 2, 3, 0, 4)
    halves = out.unflatten(0, (2, m // 2)).unflatten(2, (2, n // 2))  # (2, m / 2, 2, n / 2)
    for block in range(m // (2 * pairs)):
        first = 2 * pairs * block - reach
        last = first + width
        inside = first >= 0 and last <= m
        rows = x[first:last] if inside else x[torch.arange(first, last, device=x.device) % m]
        torch.mm(band, rows, out=middle)
        if reach:
            padded[:, :reach] = padded[:, n : n + reach]
            padded[:, n + reach :] = padded[:, reach : 2 * reach]
        torch.bmm(windows, across, out=made)
        halves[:, block * pairs : (block + 1) * pairs].unflatten(3, (blocks, pairs)).copy_(by_band)
