"""The keys."""

from __future__ import annotations

from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

KEYS: Final = (
    ("↑ ↓  j k", "choose a target or a group; page keys, home and end go further"),
    ("enter  space", "open or close a group"),
    ("g", "group by layer, or by module type"),
    ("/", "show the targets that hold a text or match a pattern such as layers.1?.*; escape ends it"),
    ("← →  h l", "rank, or share of energy, down and up"),
    ("shift+← →  [ ]", "half and twice the rank"),
    ("m", "one rank for all, or the least rank that keeps a share of the energy"),
    ("o", "give the selected target or group ranks of its own; again, or escape, to go back to all"),
    ("backspace", "take the selection's own ranks away"),
    ("s", "save a squeezed copy"),
    ("d", "dark or light"),
    ("q", "quit"),
)
_NOTES: Final = (
    "Energy is the share of squared singular values that is kept; the error is relative, and that of the best "
    "approximation, before rounding to the stored dtype. Beside another adapter, outputs and inputs say how far the "
    "spaces overlap. Sizes are those of the weights file that is written."
)


class HelpScreen(ModalScreen[None]):
    """Closed by any of the keys that people try."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter,space", "dismiss", "Close")]
    DEFAULT_CSS = """
    HelpScreen { align: center middle; }
    HelpScreen VerticalScroll {
        width: 76; max-width: 100%; height: auto; max-height: 100%;
        border: round $primary; background: $panel; padding: 0 1; border-title-color: $primary;
    }
    HelpScreen Horizontal { height: auto; }
    HelpScreen Static { height: auto; width: 1fr; }
    HelpScreen .keys { width: 15; }
    """

    def compose(self) -> ComposeResult:
        frame = VerticalScroll(
            *(
                Horizontal(Static(Content.styled(keys, "bold $accent"), classes="keys"), Static(Content(what)))
                for keys, what in KEYS
            ),
            Static(Content.styled(f"\n{_NOTES}", "$secondary")),
        )
        frame.border_title = Content("Keys")
        yield frame
