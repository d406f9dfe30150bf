"""A spectrum as characters: bars on a log axis, cut at a rank, with another spectrum's levels on top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

# What a cell is about; the widget gives each role its colour.
Role = Literal["blank", "kept", "between", "cut", "mark", "other", "axis"]

_BLOCKS: Final = " ▁▂▃▄▅▆▇█"
_LEVELS: Final = "▁─▔"  # of the other spectrum, within a cell
_MARK: Final = "│"
_NOISE: Final = 1e-6  # values below this share of the largest would only flatten the picture
_HEADROOM: Final = 0.06  # of the axis below the smallest value, so that its bar is seen
_LABEL: Final = 6  # columns of the axis
_GAP: Final = -1  # a column between broad bars
_BROAD: Final = 4  # columns, from which on bars stand apart
_SUPERSCRIPT: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Cell:
    """One character, and whether a bar is behind it."""

    sign: str
    role: Role
    behind: Role = "blank"


@dataclass(frozen=True)
class Cut:
    """The ranks that are kept: the least and the largest where those of a group differ."""

    low: int
    high: int


def chart(
    values: Sequence[float], width: int, height: int, *, cut: Cut | None = None, other: Sequence[float] = ()
) -> list[list[Cell]]:
    """`height` rows of `width` cells, the last of which is the axis of ranks; blank where there is nothing to draw.

    `values` descend. With more of them than columns each column shows the middle one of its share.
    """
    height, columns = height - 1, width - _LABEL
    scale = _Scale.of([*values, *other], height)
    if scale is None or height < 1 or columns < 1:
        return [[Cell(" ", "blank")] * width for _ in range(height + 1)]
    places = _places(max(len(values), len(other)), columns, cut)
    rows = [[*_labelled(scale.label(row)), *(Cell(" ", "blank") for _ in range(columns))] for row in range(height)]
    for x, place in enumerate(places):
        if place is None:
            for row in rows:
                row[_LABEL + x] = Cell(_MARK, "mark")
            continue
        if place == _GAP:
            continue
        eighths = scale.eighths(values[place]) if place < len(values) else 0
        role = _role(place, cut)
        for y, row in enumerate(reversed(rows)):
            filled = max(0, min(8, eighths - 8 * y))
            # a whole block has its colour behind it as well, which closes the seams that some fonts leave
            row[_LABEL + x] = Cell(_BLOCKS[filled], role if filled else "blank", role if filled == 8 else "blank")
        if place < len(other) and (level := scale.eighths(other[place])):
            y, part = divmod(level - 1, 8)
            behind = rows[height - 1 - y][_LABEL + x]
            rows[height - 1 - y][_LABEL + x] = Cell(_LEVELS[part * 3 // 8], "other", behind.behind)
    return [*rows, _ranks(places, width, cut)]


def _places(count: int, columns: int, cut: Cut | None) -> list[int | None]:
    """Which value each column shows; None for a cut. Few values are broad, with gaps between them if there is room."""
    marks = [] if cut is None else [k for k in sorted({cut.low, cut.high}) if 0 < k < count]
    room = columns - len(marks)
    if count >= room:
        shown = [min(count - 1, (2 * x + 1) * count // (2 * room)) for x in range(room)]
    else:
        broad = room // count
        bar = broad - (broad >= _BROAD)
        shown = [i if x < bar else _GAP for i in range(count) for x in range(broad)]
    places: list[int | None] = []
    for place in shown:
        while marks and place >= marks[0]:
            marks.pop(0)
            places.append(None)
        places.append(place)
    return places


def _role(place: int, cut: Cut | None) -> Role:
    if cut is None or place < cut.low:
        return "kept"
    return "between" if place < cut.high else "cut"


def _ranks(places: list[int | None], width: int, cut: Cut | None) -> list[Cell]:
    """The axis below: first and last rank, and those of the cuts under their lines."""
    line = [Cell(" ", "axis")] * width
    last = max((place for place in places if place is not None), default=0) + 1
    marks = [] if cut is None else sorted({cut.low, cut.high})
    lines = [x for x, place in enumerate(places) if place is None]
    written: list[range] = []

    def put(text: str, centre: int, role: Role) -> None:
        start = max(_LABEL, min(width - len(text), centre - len(text) // 2))
        if any(x in taken for taken in written for x in range(start - 1, start + len(text) + 1)):
            return
        line[start : start + len(text)] = [Cell(sign, role) for sign in text]
        written.append(range(start, start + len(text)))

    for x, rank in zip(lines, marks, strict=False):
        put(str(rank), _LABEL + x, "mark")
    put("1", _LABEL, "axis")
    if last > 1:
        put(str(last), _LABEL + len(places) - 1, "axis")
    return line


def _labelled(text: str) -> list[Cell]:
    return [Cell(sign, "axis") for sign in f"{text:>{_LABEL - 1}} "]


@dataclass(frozen=True)
class _Scale:
    """The log axis, from the bottom of the last row to the top of the first."""

    low: float  # log10
    high: float
    height: int

    @classmethod
    def of(cls, values: Sequence[float], height: int) -> _Scale | None:
        top = max(values, default=0.0)
        if not 0 < top < math.inf:
            return None
        low, high = math.log10(min(v for v in values if v > _NOISE * top)), math.log10(top)
        span = (high - low) or 1.0
        return cls(low - _HEADROOM * span if high > low else high - 1.0, high, height)

    def eighths(self, value: float) -> int:
        """The height of a bar, in eighths of a row; at least one for what is not zero."""
        if value <= 0:
            return 0
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return max(1, min(8 * self.height, round(share * 8 * self.height)))

    def label(self, row: int) -> str:
        """The largest value on the first row; then the powers of ten, each on the row that it lies in."""
        if row == 0:
            return short(10**self.high)
        step = (self.high - self.low) / self.height
        top = self.high - row * step
        power = math.floor(top)
        if power > top - step and (power > self.low):
            return "10" + str(power).translate(_SUPERSCRIPT)
        return short(10**self.low) if row == self.height - 1 and self.high - self.low < 1 else ""


def short(value: float) -> str:
    """At most five characters."""
    if value == 0:
        return "0"
    if 1e-3 <= value < 1e4:
        text = f"{value:.3g}"
        return text if len(text) <= 5 else f"{value:.2g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
