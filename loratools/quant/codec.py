"""Matrices in codes of a few bits with scales: value = scale * level(code) + offset, group by group along each row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from loratools._lazy import torch
from loratools.quant.bits import WIDTHS, pack, packed_size, unpack
from loratools.quant.codebooks import Levels, levels, nearest, values_of

if TYPE_CHECKING:
    from torch import Tensor

Fit = Literal["range", "peak", "mean", "squares", "moments"]

_STORED = {"F16": "float16", "F32": "float32"}
_LARGEST = 1e38
_BLOCK = 1 << 17  # numbers that are worked on together where many passes are made over them
_SWEEPS = 6  # alternations of codes and scales; more changes the third digit of an error at most


@dataclass(frozen=True)
class Coding:
    """How a matrix is written in codes.

    `group`: numbers of a row that share a scale; 0, all of a row; -1, the whole matrix. The last group of a row may be
    shorter. `offset`: whether every group has one. `stored`: the dtype of scales and offsets, F16 or F32.
    """

    bits: int
    levels: Levels
    group: int = 0
    offset: bool = False
    stored: str = "F16"

    def __post_init__(self) -> None:
        levels(self.levels, self.bits)
        if self.bits not in WIDTHS or self.group < -1 or self.stored not in _STORED:
            raise ValueError(f"no codec has {self.bits} bits, groups of {self.group} and scales in {self.stored}")

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of the scales of a (rows, columns) matrix."""
        if self.group == -1:
            return 1, 1
        return rows, math.ceil(columns / self.group) if self.group else min(columns, 1)

    def size(self, rows: int, columns: int) -> int:
        """Bytes that a (rows, columns) matrix takes."""
        scales = math.prod(self.groups(rows, columns)) * (2 if self.stored == "F16" else 4)
        return packed_size(rows * columns, self.bits) + scales * (2 if self.offset else 1)

    def to_json(self) -> list[Any]:
        """As `from_json` takes it."""
        return [self.bits, self.levels, self.group, self.offset, self.stored]

    @classmethod
    def from_json(cls, fields: Any) -> Coding:
        """ValueError for what is no coding."""
        match fields:
            case [int(bits), str(name), int(group), bool(offset), str(stored)] if name in get_args(Levels):
                return cls(bits, cast("Levels", name), group, offset, stored)
        raise ValueError(f"{fields!r} describes no coding")


@dataclass(frozen=True, eq=False)
class Coded:
    """A matrix in codes."""

    coding: Coding
    codes: Tensor  # (rows, columns) uint8
    scales: Tensor  # as `Coding.groups`, in the stored dtype
    offsets: Tensor | None = None  # likewise

    def decode(self) -> Tensor:
        """The float32 matrix."""
        out = values_of(self.codes, self.coding.levels, self.coding.bits)
        values, scales = _beside(out, self.scales.float(), self.coding)
        values.mul_(scales)
        if self.offsets is not None:
            values.add_(_beside(out, self.offsets.float(), self.coding)[1])
        return out

    def to_bytes(self) -> Tensor:
        """Scales, offsets, codes, as a uint8 vector of `Coding.size` bytes."""
        parts = [t.contiguous().reshape(-1).view(torch.uint8) for t in (self.scales, self.offsets) if t is not None]
        return torch.cat([*parts, pack(self.codes, self.coding.bits)])


def from_bytes(data: Tensor, coding: Coding, rows: int, columns: int) -> Coded:
    """What `Coded.to_bytes` wrote; ValueError where the bytes are not those of such a matrix."""
    if data.numel() != coding.size(rows, columns):
        raise ValueError(f"{data.numel()} bytes are not the {coding.size(rows, columns)} of {rows} x {columns} codes")
    shape = coding.groups(rows, columns)
    dtype = getattr(torch, _STORED[coding.stored])
    step = math.prod(shape) * dtype.itemsize
    numbers = [data[i * step : (i + 1) * step].clone().view(dtype).reshape(shape) for i in range(1 + coding.offset)]
    codes = unpack(data[step * len(numbers) :], coding.bits, rows * columns).reshape(rows, columns)
    return Coded(coding, codes, numbers[0], numbers[1] if coding.offset else None)


def encode(matrix: Tensor, coding: Coding, fit: Fit) -> Coded:
    """`matrix` (rows, columns) in codes, the scales of its groups by `fit`, codes rounded to what is stored of them.

    * `range`: uniform levels from the least to the greatest number, as round-to-nearest has it; needs offsets.
    * `peak`: the outermost level lies at the largest magnitude.
    * `mean`: the mean magnitude stands at the one level of a sign: the least squared error of one bit.
    * `squares`: scale and codes by turns, each the best for the other; starts at the standard deviation, or at the peak
      where that errs less.
    * `moments`: mean and unbiased deviation, as PETL-ViT; needs offsets.

    A group of zeros decodes to zeros, one of equal numbers under `range` or `moments` to that number. ValueError for
    NaN, infinity, and numbers beyond 1e38, whose range float32 lacks. Scales that F16 would lose are kept in F32.
    """
    if matrix.numel():
        ends = torch.stack(torch.aminmax(matrix))
        if not bool(torch.isfinite(ends).all()):
            raise ValueError("holds NaN or infinity")
        if float(ends.abs().max()) > _LARGEST:
            raise ValueError(f"holds numbers beyond {_LARGEST:g}")
    x = matrix.float().contiguous()
    if coding.offset != (fit in ("range", "moments")):
        raise ValueError(f"a fit by {fit} {'needs' if not coding.offset else 'has no'} offsets")
    if not x.numel():
        none = x.new_zeros(coding.groups(*x.shape), dtype=getattr(torch, _STORED[coding.stored]))
        return Coded(coding, x.to(torch.uint8), none, none if coding.offset else None)
    if fit == "squares":
        return _by_squares(x, coding)
    scales, offsets = _SCALES[fit](_chunks(x, coding), coding)
    return _round(x, coding, scales, offsets, fit)


def _chunks(x: Tensor, coding: Coding) -> tuple[Tensor, Tensor | None]:
    """The groups of x as the last axis, NaN-free padding, and a mask of what is no padding where there is some."""
    rows, columns = x.shape
    if coding.group == -1:
        return x.reshape(1, 1, -1), None
    group = coding.group or max(columns, 1)
    if rest := -columns % group:
        padded = torch.nn.functional.pad(x, (0, rest)).reshape(rows, -1, group)
        mask = torch.nn.functional.pad(torch.ones(columns, dtype=torch.bool), (0, rest)).reshape(1, -1, group)
        return padded, mask
    return x.reshape(rows, columns // group, group), None


def _range(chunks: tuple[Tensor, Tensor | None], coding: Coding) -> tuple[Tensor, Tensor]:
    x, mask = chunks
    if mask is None:
        low, high = x.amin(-1), x.amax(-1)  # both at once is slower
    else:
        low, high = x.masked_fill(~mask, math.inf).amin(-1), x.masked_fill(~mask, -math.inf).amax(-1)
    return (high - low) / ((1 << coding.bits) - 1), low


def _peak(chunks: tuple[Tensor, Tensor | None], coding: Coding) -> tuple[Tensor, None]:
    return chunks[0].abs().amax(-1) / max(abs(v) for v in levels(coding.levels, coding.bits)), None


def _mean(chunks: tuple[Tensor, Tensor | None], coding: Coding) -> tuple[Tensor, None]:
    x, mask = chunks
    count = x.shape[-1] if mask is None else mask.sum(-1)
    return x.abs().double().sum(-1).div(count).float() / levels(coding.levels, coding.bits)[-1], None


def _moments(chunks: tuple[Tensor, Tensor | None], coding: Coding) -> tuple[Tensor, Tensor]:
    x, mask = chunks
    count = torch.tensor(x.shape[-1]) if mask is None else mask.sum(-1)
    apart = x.double()
    mean = apart.sum(-1) / count
    apart.sub_(mean.unsqueeze(-1))
    squares = (apart if mask is None else apart.mul_(mask)).square_().sum(-1)
    return (squares / (count - 1).clamp_min(1)).sqrt().float(), mean.float()


_SCALES = {"range": _range, "peak": _peak, "mean": _mean, "moments": _moments}


def _round(x: Tensor, coding: Coding, scales: Tensor, offsets: Tensor | None, fit: Fit) -> Coded:
    coding, scales, offsets = _stored(coding, scales, offsets)
    wide = scales.float()
    divisor = wide + 1e-5 if fit == "moments" else torch.where(wide == 0, 1.0, wide)  # PETL-ViT's own guard
    if coding.bits == 1 and coding.levels != "uniform" and offsets is None:
        return Coded(coding, nearest(x, coding.levels, 1), scales)  # a sign has no size
    y, by = _beside(x, divisor, coding)
    y = y / by if offsets is None else (y - _beside(x, offsets.float(), coding)[1]).div_(by)
    return Coded(coding, nearest(y, coding.levels, coding.bits).reshape(x.shape), scales, offsets)


def _stored(coding: Coding, scales: Tensor, offsets: Tensor | None) -> tuple[Coding, Tensor, Tensor | None]:
    """Scales and offsets as they are kept: in F32 where F16 has too few digits for them."""
    if coding.stored == "F16":
        both = torch.cat([scales.reshape(-1), *([] if offsets is None else [offsets.reshape(-1)])])
        least = torch.finfo(torch.float16).tiny / 8  # below, three digits of ten bits are lost
        if bool(((both.abs() > 65504) | ((both != 0) & (both.abs() < least))).any()):
            coding = replace(coding, stored="F32")
    dtype = getattr(torch, _STORED[coding.stored])
    return coding, scales.to(dtype), None if offsets is None else offsets.to(dtype)


def _by_squares(x: Tensor, coding: Coding) -> Coded:
    """Some rows at a time, whose numbers stay in a core's cache through all the sweeps."""
    height = len(x) if coding.group == -1 else max(1, _BLOCK // max(1, x.shape[1]))
    found = [_block_by_squares(block, coding) for block in x.split(height)]
    if len({each.coding for each in found}) > 1:  # some scales need F32, so all have it
        return _by_squares(x, replace(coding, stored="F32"))
    return Coded(found[0].coding, torch.cat([each.codes for each in found]), torch.cat([each.scales for each in found]))


def _block_by_squares(x: Tensor, coding: Coding) -> Coded:
    chunks = _chunks(x, coding)
    values, mask = chunks
    flat = values if mask is None else values * mask
    count = values.shape[-1] if mask is None else mask.sum(-1)
    start = (flat.double().square().sum(-1) / count).sqrt().float()
    best: Coded | None = None
    least: Tensor | None = None
    for scales in (start, _peak(chunks, coding)[0]):
        coded = _round(x, coding, scales, None, "squares")
        for _ in range(_SWEEPS):
            level = _chunks(values_of(coded.codes, coding.levels, coding.bits), coded.coding)[0]
            level = level if mask is None else level * mask
            square = (level * level).sum(-1, dtype=torch.float64)
            scales = torch.where(square > 0, (level * flat).sum(-1, dtype=torch.float64) / square, 0.0)
            before = coded
            coded = _round(x, coding, scales.clamp_min(0).float(), None, "squares")
            if torch.equal(coded.scales, before.scales):  # and so it stays
                break
        error = _chunks((coded.decode() - x).double().square(), coded.coding)[0].sum(-1)
        if best is None or least is None:
            best, least = coded, error
        else:
            scales = torch.where(error < least, coded.scales.float(), best.scales.float())
            best = _round(x, coding, scales, None, "squares")
    assert best is not None
    return best


def _beside(x: Tensor, numbers: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """A view of `x` and one of `numbers`, those of its groups, that broadcast against each other."""
    if coding.group <= 0 or numbers.shape[1] <= 1:
        return x, numbers
    if x.shape[1] % coding.group == 0:
        return x.view(len(x), -1, coding.group), numbers.unsqueeze(-1)
    return x, numbers.repeat_interleave(coding.group, dim=1)[:, : x.shape[1]]


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a matrix in codes; the rows of several parts add up where they overlap."""

    start: int
    coded: Coded

    @property
    def rows(self) -> range:
        return range(self.start, self.start + self.coded.codes.shape[0])


def decoded(parts: tuple[Part, ...], rows: int, columns: int) -> Tensor:
    """The float32 (rows, columns) matrix that the parts make; zeros where there is none."""
    if len(parts) == 1 and len(parts[0].rows) == rows:
        return parts[0].coded.decode()
    out = torch.zeros(rows, columns)
    for part in parts:
        out[part.rows.start : part.rows.stop] += part.coded.decode()
    return out


def rounds_of(matrix: Tensor, codings: tuple[Coding, ...], fit: Fit, *, start: int = 0) -> Iterator[Part]:
    """`matrix` in the first coding, what that leaves in the next, and so on."""
    rest = matrix
    for i, coding in enumerate(codings):
        coded = encode(rest, coding, fit)
        yield Part(start, coded)
        if i + 1 < len(codings):
            rest = rest.float() - coded.decode()
