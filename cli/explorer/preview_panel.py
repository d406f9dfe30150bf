"""The panel below: what the tried ranks save and lose, for the whole adapter and for the selection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widget import Widget

from loratools.reports.preview import energy_kept, relative_error
from loratools_cli.explorer.choice import Mode
from loratools_cli.explorer.figures import bar, energy_style, figure, fitted, joined, share, size
from loratools_cli.explorer.slider import Slider
from loratools_cli.text import plain

if TYPE_CHECKING:
    from loratools_cli.explorer.session import Session

_LABEL: Final = 9  # columns
_BAR: Final = 10
_MIN_COLUMN: Final = 20

_RULES: Final = {Mode.RANK: "one rank for all", Mode.ENERGY: "least rank that keeps the energy"}


class PreviewPanel(Vertical):
    """Slider and totals; the border says the rule and how many targets it touches."""

    DEFAULT_CSS = """
    PreviewPanel { height: 7; border: round $border; padding: 0 1; border-title-color: $primary;
        border-subtitle-color: $secondary; }
    PreviewPanel.-own { border: round $accent; border-title-color: $accent; }
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.slider = Slider(session)
        self.totals = Totals(session)

    def compose(self) -> ComposeResult:
        yield self.slider
        yield self.totals

    def show(self, *, own: bool) -> None:
        """Draw what the session says now."""
        self.set_class(own, "-own")
        self.slider.own = own
        branch = self.session.selected
        rule = f"rank of its own: {branch.target or branch.name}" if own else _RULES[self.session.choice.mode]
        self.border_title = Content(f"Squeeze preview · {fitted(rule, 48)}")
        self.border_subtitle = Content(f"{self._touched()}")
        self.slider.refresh()
        self.totals.refresh()

    def _touched(self) -> str:
        found, own = self.session.preview, len(self.session.choice.own)
        if found.refused is not None:
            return fitted(f"cannot be saved: {plain(found.refused)}", max(10, self.size.width - 8))
        return joined([
            f"{found.changed} of {len(found.targets)} targets get a lower rank",
            f"{own} with a rank of {'its' if own == 1 else 'their'} own" if own else "",
            f"{found.unmeasured} not measured" if found.unmeasured else "",
        ])  # fmt: skip


class Totals(Widget):
    """Two columns: the whole adapter, and the selection."""

    DEFAULT_CSS = """
    Totals { height: 4; }
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def render(self) -> Content:
        column = max(_MIN_COLUMN, (self.size.width - _LABEL) // 2)
        branch = self.session.selected
        whole, chosen = self.session.preview, self.session.previews(branch.targets)
        before = sum(one.bytes_before for one in chosen)
        after = [one.bytes_after for one in chosen]
        sized = None if None in after else sum(one or 0 for one in after)
        kept, error = energy_kept(chosen), relative_error(chosen)
        head = (("whole adapter", "$secondary"), (fitted(branch.target or branch.name, column - 1), "$secondary"))
        rows = [
            ("", Content.assemble(head[0]), Content.assemble(head[1])),
            ("size", _size(whole.bytes_before, whole.bytes_after), _size(before, sized)),
            ("energy", _energy(whole.energy_kept), _energy(kept)),
            ("error", _error(whole.relative_error), _error(error)),
        ]
        lines = [
            Content.assemble(
                (f"{label:<{_LABEL}}", "$secondary"),
                left.truncate(column, ellipsis=True, pad=True),
                right.truncate(column, ellipsis=True),
            )
            for label, left, right in rows
        ]
        return Content("\n").join(lines)


def _size(before: int, after: int | None) -> Content:
    of = "" if after is None or not before else f"  {share(after / before)}"
    return Content.assemble(size(before), " → ", (size(after), "bold"), (of, "$secondary"))


def _energy(kept: float | None) -> Content:
    if kept is None:
        return Content.styled("–", "$secondary")
    colour = f"${energy_style(kept)}"
    return Content.assemble((f"{share(kept):<9}", f"bold {colour}"), (bar(kept, _BAR), f"{colour} on $panel"))


def _error(error: float | None) -> Content:
    return Content.assemble((figure(error), "bold"))
