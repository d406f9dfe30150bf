"""What tables of targets have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loratools.ops.inspect import places
from loratools_cli.text import plain, span

LISTED = 3  # of what is worth an example


def new_grid(first: str, *others: str) -> Table:
    """A table of a name and some numbers, without rules."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    made.add_column(first, overflow="fold")
    for title in others:
        made.add_column(title, justify="right", no_wrap=True)
    return made


def texts(*cells: str, style: str = "") -> list[Text]:
    """The cells of a row, made harmless."""
    return [Text(plain(cell), style=style) for cell in cells]


Row = TypeVar("Row")


def by_module(changes: Mapping[str, Row]) -> dict[str, list[Row]]:
    """Rows of targets by the module that each changes."""
    found: dict[str, list[Row]] = {}
    for target, (_, module) in places(list(changes)).items():
        found.setdefault(module, []).append(changes[target])
    return found


def some(values: Iterable[float | None], shown: Callable[[float], str] = str) -> str:
    """The span of the values that there are, or a dash."""
    known = [value for value in values if value is not None]
    return span(known, shown) if known else "-"


def reasons(title: str, reasons: Mapping[str, str], everything: bool) -> Iterator[RenderableType]:
    """How many names there are and why, with examples; all of them where everything is asked for."""
    if not reasons:
        return
    yield Text(f"{title}: {len(reasons)}", style="bold")
    if everything:
        for name, reason in reasons.items():
            yield Text(f"  {plain(name)}" + (f": {plain(reason)}" if reason else ""))
        return
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    for reason, group in list(names.items())[:LISTED]:
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        yield Text(f"  {plain(group[0])}{more}" + (f": {plain(reason)}" if reason else ""))
    if len(names) > LISTED:
        yield Text(f"  ... and {sum(map(len, list(names.values())[LISTED:]))} more; see --all")
