"""The drawn spectrum of the selection."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Final

from textual.content import Content
from textual.widget import Widget

from loratools.reports.inspect import group
from loratools_cli.explorer.chart import Cell, Cut, Role, chart

if TYPE_CHECKING:
    from loratools_cli.explorer.session import Session

_COLOURS: Final[dict[Role, str]] = {
    "blank": "",
    "kept": "$primary",
    "between": "$secondary",
    "cut": "$lost",
    "mark": "$accent",
    "other": "$other",
    "axis": "$secondary",
}
_ROOM_ABOVE: Final = 10  # rows, from which on one is left blank


class SpectrumView(Widget):
    """Bars of singular values on a log axis; of a group, their root mean squares."""

    DEFAULT_CSS = """
    SpectrumView { height: 1fr; padding: 0 1; }
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def render(self) -> Content:
        width, height = self.size
        values = self._values()
        if values is None or not any(values):
            return Content.styled(self._why_not(values), "$secondary")
        if height < 2:
            return Content()
        apart = height >= _ROOM_ABOVE
        rows = chart(values, width, height - apart, cut=self._cut(), other=self._others())
        return Content("\n").join([*[Content()] * apart, *(_line(row) for row in rows)])

    def _values(self) -> Sequence[float] | None:
        """None where nothing is measured."""
        branch = self.session.selected
        if branch.target is not None:
            return self._one(branch.target)
        whole = self.session.group(branch.targets)
        return None if whole is None else whole.spectrum

    def _one(self, target: str) -> Sequence[float] | None:
        curve = self.session.curves.get(target)
        if curve is None:
            return None
        return self.session.numbers[target].spectrum if curve.spectrum is None else curve.spectrum.values

    def _others(self) -> Sequence[float]:
        branch = self.session.selected
        known = [c for t in branch.targets if (c := self.session.compared.get(t)) is not None]
        if branch.target is not None and known and known[0].curve is not None:
            spectrum = known[0].curve.spectrum
            if spectrum is not None:
                return spectrum.values
        return group(c.numbers for c in known if c.numbers is not None).spectrum

    def _cut(self) -> Cut | None:
        known = [one for one in self.session.previews(self.session.selected.targets) if one.squared_norm is not None]
        ranks = [one.rank_after for one in known if one.rank_after]
        return Cut(min(ranks), max(ranks)) if ranks else None

    def _why_not(self, values: Sequence[float] | None) -> str:
        branch = self.session.selected
        if not branch.targets:
            return ""
        if values is not None:
            return "zero update: no singular value to draw"
        return "no spectrum" if all(t in self.session.problems for t in branch.targets) else "measuring …"


def _line(row: list[Cell]) -> Content:
    parts = []
    for (role, behind), cells in groupby(row, key=lambda cell: (cell.role, cell.behind)):
        ground = f" on {_COLOURS[behind]}" if behind != "blank" else ""
        parts.append(("".join(cell.sign for cell in cells), f"{_COLOURS[role]}{ground}".strip()))
    return Content.assemble(*parts)
