"""A page of sections, each of facts, tables and drawings: what `page_blocks.js` and `page_charts.js` can show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from loratools.reports.pages import page, presentable

Block: TypeAlias = dict[str, Any]
Cell: TypeAlias = Literal["text", "prose", "number", "share", "seconds", "bar"]  # how a column is told
Style: TypeAlias = Literal["first", "second", "third"]

_BINS: Final = 20
_POINTS: Final = 1000  # of a curve: what a screen can show


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; `id` is its place in links."""

    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Card:
    """One figure that is read first, and what it is of."""

    title: str
    figure: str
    more: str


@dataclass(frozen=True)
class Line:
    """A curve through points, `marked` one by one; its style tells it from others also without colours."""

    name: str
    points: Sequence[tuple[float, float]]
    style: Style = "first"
    marked: bool = False


def block_page(
    command: str,
    title: str,
    about: str,
    sections: Iterable[Section],
    *,
    cards: Iterable[Card] = (),
    tags: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page of a command: `tags` above its title, `notes` below it, figures on cards, sections. Any text is data."""
    data = {
        "title": title,
        "about": about,
        "tags": list(tags),
        "notes": list(notes),
        "cards": [vars(card) for card in cards],
        "sections": [vars(section) for section in sections],
    }
    return page(
        command,
        "page_blocks.html",
        styles=("page_blocks.css",),
        data=presentable(data),
        scripts=("page_elements.js", "page_theme.js", "page_svg.js", "page_charts.js", "page_blocks.js"),
    )


def facts(rows: Mapping[str, str]) -> Block:
    """Names and what they are."""
    return {"kind": "facts", "rows": list(rows.items())}


def table(
    columns: Sequence[tuple[str, Cell]],
    rows: Iterable[Sequence[Any]],
    *,
    title: str = "",
    strong: Sequence[int] = (),
    tall: bool = False,
) -> Block:
    """Rows under named columns, some of them `strong`; a `tall` one scrolls. A bar is a share from 0 to 1."""
    return {
        "kind": "table",
        "title": title,
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "strong": list(strong),
        "tall": tall,
    }


def paragraph(text: str) -> Block:
    """A few sentences."""
    return {"kind": "paragraph", "text": text}


def hidden(title: str, block: Block) -> Block:
    """A block that is shown on demand."""
    return {"kind": "hidden", "title": title, "block": block}


def beside(*blocks: Block) -> Block:
    """Blocks next to one another, where there is room."""
    return {"kind": "beside", "blocks": list(blocks)}


def curves(
    title: str, lines: Iterable[Line], *, x: str, y: str, share: bool = False, kept: float | None = None
) -> Block:
    """Curves over one axis; a `share` is told from 0 to 100 %. `kept` is marked on the x axis."""
    drawn = [vars(line) | {"points": _thinned(line.points)} for line in lines if line.points]
    return {"kind": "curves", "title": title, "x": x, "y": y, "share": share, "lines": drawn, "kept": kept}


def histograms(title: str, rows: Mapping[str, Sequence[float]], *, x: str, threshold: float | None) -> Block:
    """Probabilities of several kinds in equal bins, one kind above the other, each on its own scale."""
    counted = [{"name": name, "counts": _counts(values)} for name, values in rows.items() if values]
    return {"kind": "histograms", "title": title, "x": x, "rows": counted, "threshold": threshold}


def spreads(title: str, rows: Mapping[str, Sequence[float]], *, x: str) -> Block:
    """Of each row: the least, the quartiles and the greatest."""
    return {
        "kind": "spreads",
        "title": title,
        "x": x,
        "rows": [{"name": name, "five": list(five)} for name, five in rows.items()],
    }


def _counts(values: Iterable[float]) -> list[int]:
    counts = [0] * _BINS
    for value in values:
        counts[min(int(value * _BINS), _BINS - 1)] += 1
    return counts


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, or means of as many neighbours each as leave no more than can be seen."""
    n = -(-len(points) // _POINTS)
    groups = [points[i : i + n] for i in range(0, len(points), n)] if n > 1 else [[point] for point in points]
    return [(sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some)) for some in groups]
