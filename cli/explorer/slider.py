"""The slider of the preview: drawn with the rank or the energy that is tried, and moved by the mouse as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from textual import events
from textual.content import Content
from textual.message import Message
from textual.widget import Widget

from loratools_cli.explorer.choice import Mode
from loratools_cli.text import percent

if TYPE_CHECKING:
    from loratools_cli.explorer.session import Session

_LABEL: Final = 17  # columns
_END: Final = 8


class Slider(Widget):
    """One line. The app says what its place means."""

    DEFAULT_CSS = """
    Slider { height: 1; }
    """

    class Moved(Message):
        """The mouse asks for a place from 0 to 1."""

        def __init__(self, position: float) -> None:
            super().__init__()
            self.position = position

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.own = False  # whether it moves the selection's own rank

    def render(self) -> Content:
        label, position, end = self._state()
        width = self._bar
        knob = round(position * (width - 1))
        colour = "$accent" if self.own else "$primary"
        return Content.assemble(
            (f"{label:<{_LABEL}}", "bold"),
            ("━" * knob, colour),
            ("●", f"bold {colour}"),
            ("━" * (width - 1 - knob), "$border"),
            (f" {end}", "$secondary"),
        )

    @property
    def _bar(self) -> int:
        return max(2, self.size.width - _LABEL - _END)

    def _state(self) -> tuple[str, float, str]:
        """What is written before the bar, the place, and what is written after it."""
        choice = self.session.choice
        if self.own:
            rank = self.session.own_rank()
            if rank is None:
                return "no rank of its own", 0.0, ""
            most = max(self.session.adapter.entries[t].rank for t in self.session.own_targets)
            return f"own rank {rank}", (rank - 1) / (most - 1) if most > 1 else 1.0, str(most)
        if choice.mode is Mode.ENERGY:
            shown = percent(choice.share)
            return f"energy {shown} %", choice.position, "100 %"
        return f"rank {choice.rank}", choice.position, str(choice.most)

    def on_mouse_down(self, event: events.MouseDown) -> None:
        self.capture_mouse()
        self._ask(event)

    def on_mouse_up(self) -> None:
        self.release_mouse()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if self.app.mouse_captured is self:
            self._ask(event)

    def _ask(self, event: events.MouseEvent) -> None:
        self.post_message(self.Moved(max(0.0, min(1.0, (event.x - _LABEL) / (self._bar - 1)))))
