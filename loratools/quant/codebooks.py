"""The levels that codes stand for, before a scale: written out, for files that must decode to the same numbers forever.

* `median`: PETL-ViT's (arXiv 2307.16867): each value is the Gaussian median of its cell, so that the expected absolute
  error is least; boundaries lie midway between values.
* `lloyd`: each value is the Gaussian mean of its cell (Lloyd 1982, Max 1960): the least squared error.
* `nf`: NormalFloat (QLoRA, arXiv 2305.14314) as bitsandbytes has it for 4 bits, and its construction for 2 and 3.
* `uniform`: the codes themselves, 0 to 2 ** bits - 1.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Literal

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Levels = Literal["median", "lloyd", "nf", "uniform"]

_MEDIAN_HALVES = {
    1: (0.674489737,),
    2: (0.377754152, 1.26572037),
    3: (0.202623799, 0.625419736, 1.11372888, 1.79202509),
    4: (0.105550289, 0.319036007, 0.540072083, 0.775192082, 1.03400636, 1.33310676, 1.70773757, 2.26549053),
}
_LLOYD_HALVES = {
    1: (0.797884583,),
    2: (0.452780038, 1.51041758),
    3: (0.24509418, 0.756005287, 1.34390926, 2.15194559),
    4: (0.128395036, 0.388048291, 0.656759143, 0.942340434, 1.25623119, 1.6180464, 2.06901717, 2.73258948),
}
_NORMAL = {
    2: (-1, 0, 0.435818166, 1),
    3: (-1, -0.535022736, -0.246931434, 0, 0.18333748, 0.381993949, 0.622985721, 1),
    4: (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
}


def levels(name: Levels, bits: int) -> tuple[float, ...]:
    """The 2 ** bits values, ascending; ValueError where there are none of that name and width."""
    if name == "uniform" and bits in (1, 2, 3, 4, 8):
        return tuple(float(i) for i in range(1 << bits))
    if name == "nf" and bits in _NORMAL:
        return _NORMAL[bits]
    halves = {"median": _MEDIAN_HALVES, "lloyd": _LLOYD_HALVES}.get(name, {})
    if bits not in halves:
        raise ValueError(f"there is no codebook {name} of {bits} bits")
    half = halves[bits]
    return (*(-v for v in reversed(half)), *half)


@cache
def _table(name: Levels, bits: int) -> tuple[Tensor, Tensor]:
    values = torch.tensor(levels(name, bits), dtype=torch.float32)
    return values, (values[1:] + values[:-1]) / 2


@cache
def _pairs(name: Levels, bits: int) -> Tensor:
    """The levels of two codes at once, as one number of eight bytes, at the number that their two bytes make."""
    values = _table(name, bits)[0]
    codes = torch.arange(((1 << bits) - 1) * 257 + 1).clamp_max(((1 << bits) << 8) - 1)
    both = torch.stack([codes & 255, codes >> 8], dim=1).clamp_max((1 << bits) - 1)
    return values[both].view(torch.float64).reshape(-1)


def nearest(x: Tensor, name: Levels, bits: int) -> Tensor:
    """The code of the level nearest to each number of `x`, the upper one of two; uint8, in the shape of `x`."""
    if name == "uniform":
        return x.round().clamp_(0, (1 << bits) - 1).to(torch.uint8)
    if bits == 1:
        return (x >= 0).to(torch.uint8)
    return cells(x, _table(name, bits)[1], upper=True)


def cells(x: Tensor, boundaries: Tensor, *, upper: bool) -> Tensor:
    """How many of the boundaries each number has below it, and at it where `upper`; uint8, in the shape of `x`."""
    boundaries = boundaries.to(x)
    if x.device.type != "cpu":
        return torch.bucketize(x.contiguous(), boundaries, right=upper).to(torch.uint8)
    import numpy as np

    numbers, compare = x.detach().contiguous().numpy(), np.greater_equal if upper else np.greater
    codes, above = np.zeros(numbers.shape, np.uint8), np.empty(numbers.shape, np.bool_)
    for boundary in boundaries.numpy():  # a dozen comparisons of everything: still ten times as fast as bucketize
        compare(numbers, boundary, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    return torch.from_numpy(codes)


def values_of(codes: Tensor, name: Levels, bits: int) -> Tensor:
    """The float32 levels of the codes, in their shape."""
    if name == "uniform":
        return codes.float()
    values = _table(name, bits)[0]
    if bits == 1 and name != "nf":
        half = float(values[1])
        return codes.float().mul_(2 * half).sub_(half)
    flat = codes.contiguous().reshape(-1)
    if codes.device.type != "cpu" or flat.numel() % 2 or flat.storage_offset() % 2:
        return values.to(codes.device)[codes.long()]
    both = flat.view(torch.int16).int()
    return _pairs(name, bits).index_select(0, both).view(torch.float32).reshape(codes.shape)
