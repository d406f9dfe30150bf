"""The explorer's app: its layout, its keys, and the threads behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import ClassVar, Final

from textual import on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Footer, Input, Tree

from loratools_cli.explorer.choice import Choice, Mode
from loratools_cli.explorer.details import Details
from loratools_cli.explorer.grouping import Branch
from loratools_cli.explorer.header import Header
from loratools_cli.explorer.help_screen import HelpScreen
from loratools_cli.explorer.measuring import Compared, Found, Measuring
from loratools_cli.explorer.preview_panel import PreviewPanel
from loratools_cli.explorer.save_screen import SaveScreen
from loratools_cli.explorer.saving import Saving
from loratools_cli.explorer.session import Session
from loratools_cli.explorer.slider import Slider
from loratools_cli.explorer.spectrum_view import SpectrumView
from loratools_cli.explorer.target_tree import TargetTree
from loratools_cli.explorer.themes import DARK, LIGHT, first_theme
from loratools_cli.failures import explain
from loratools_cli.text import plain

_BETWEEN: Final = 0.1  # seconds from one drawing of new results to the next


class Explorer(App[None]):
    """Draws a session. Linear algebra and writing run on threads, which hand over their results as messages."""

    TITLE = "loratools explore"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "step(-1)", "Rank", key_display="←→"),
        Binding("right,l", "step(1)", show=False),
        Binding("shift+left,left_square_bracket", "leap(False)", "×2", key_display="[ ]"),
        Binding("shift+right,right_square_bracket", "leap(True)", show=False),
        Binding("m", "mode", "Mode"),
        Binding("o", "own", "Own"),
        Binding("backspace,delete", "common", show=False),
        Binding("g", "regroup", "Group"),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("s", "save", "Save"),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("q", "quit", "Quit"),
        Binding("d", "ground", show=False),
        Binding("escape", "leave", show=False),
    ]
    CSS = """
    Screen { background: $background; }
    #left { width: 42%; min-width: 30; max-width: 64; border: round $border; border-title-color: $primary; }
    #left:focus-within { border: round $primary; }
    #right { width: 1fr; border: round $border; border-title-color: $primary; }
    #middle { height: 1fr; }
    #filter { height: 1; border: none; padding: 0 1; background: $panel; display: none; }
    #filter.-open { display: block; }
    """

    class Measured(Message):
        """Results of the measuring thread."""

        def __init__(self, results: Sequence[Found] | Sequence[Compared]) -> None:
            super().__init__()
            self.results = results

    class Sized(Message):
        """The size of a file with many targets; `take` puts it into the session."""

        def __init__(self, take: Callable[[], None]) -> None:
            super().__init__()
            self.take = take

    class Failed(Message):
        """A thread ended in an error."""

        def __init__(self, problem: str) -> None:
            super().__init__()
            self.problem = problem

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.own = False  # whether the keys move the selection's own rank
        self._leaving = threading.Event()
        self._is_due = False
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        self.theme = first_theme()

    def compose(self) -> ComposeResult:
        yield Header(self.session)
        with Horizontal(id="middle"):
            with Vertical(id="left"):
                yield Input(placeholder="text or pattern, such as *q_proj", id="filter", compact=True)
                yield TargetTree(self.session)
            with Vertical(id="right"):
                yield Details(self.session)
                yield SpectrumView(self.session)
        yield PreviewPanel(self.session)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one(TargetTree).focus()
        self.draw()
        self.run_worker(self._measure, thread=True, exit_on_error=False)
        for warning in self.session.adapter.warnings:
            self.notify(plain(warning), severity="warning", markup=False)

    def on_unmount(self) -> None:
        self._leaving.set()

    def on_resize(self) -> None:
        self.call_after_refresh(self.draw)

    # What the threads do

    def _measure(self) -> None:
        session = self.session
        work = Measuring(
            session.adapter,
            session.base,
            session.other,
            session.pairs,
            wanted=lambda: session.selected.target,
            stopped=self._leaving.is_set,
        )
        try:
            for results in work.run():
                self.post_message(self.Measured(results))
        except Exception as error:  # noqa: BLE001 - shown, whatever it is
            self.post_message(self.Failed(explain(error)[1]))

    @on(Measured)
    def _take_measured(self, message: Measured) -> None:
        self.session.add(message.results)
        if not self._is_due:
            self._is_due = True
            self.set_timer(_BETWEEN, self.draw)

    @on(Sized)
    def _take_size(self, message: Sized) -> None:
        message.take()
        self.query_one(PreviewPanel).show(own=self.own)

    @on(Failed)
    def _take_failure(self, message: Failed) -> None:
        self.notify(plain(message.problem), severity="error", markup=False)

    # What the screen shows

    def draw(self) -> None:
        """Everything, as the session knows it now."""
        self._is_due = False
        if not self.is_running or self._leaving.is_set():
            return
        session = self.session
        shown, every = len(session.shown), len(session.adapter.entries)
        count = f" · {shown} of {every}" if session.pattern else ""
        means = "" if session.selected.kind == "target" else " · root mean squares"
        self.query_one("#right").border_title = Content(f"Spectrum{means}")
        self.query_one("#left").border_title = Content(f"By {session.by}{count}")
        self.query_one(Header).refresh()
        self.query_one(TargetTree).relabel()
        self.query_one(Details).refresh(layout=True)
        self.query_one(SpectrumView).refresh()
        self.query_one(PreviewPanel).show(own=self.own)
        if not session.sizes_at_once:
            self._size_later()

    def _size_later(self) -> None:
        found = self.session.preview
        if found.bytes_after is not None or found.refused is not None:
            return
        work = self.session.to_size()
        self.run_worker(
            lambda: self.post_message(self.Sized(work())),
            thread=True,
            exit_on_error=False,
            exclusive=True,
            group="size",
        )

    def _try(self, choice: Choice) -> None:
        if choice != self.session.choice:
            self.session.choice = choice
            if not self._is_due:  # several keys at once are drawn once
                self._is_due = True
                self.call_after_refresh(self.draw)

    @on(Tree.NodeHighlighted)
    def _select(self, event: Tree.NodeHighlighted[Branch]) -> None:
        if event.node.data is not None and event.node.data != self.session.selected:
            self.session.selected = event.node.data
            self.draw()

    @on(Slider.Moved)
    def _slide(self, event: Slider.Moved) -> None:
        session = self.session
        self._try(session.with_own_at(event.position) if self.own else session.choice.moved_to(event.position))

    # Keys

    def action_step(self, by: int) -> None:
        """One rank down or up."""
        self._try(self.session.with_own(by=by) if self.own else self.session.choice.stepped(by))

    def action_leap(self, up: bool) -> None:
        """Half or twice the rank."""
        self._try(self.session.with_own(up=up) if self.own else self.session.choice.leapt(up))

    def action_mode(self) -> None:
        """The other rule for all targets."""
        self.own = False
        self.session.choice = self.session.choice.in_mode(
            Mode.ENERGY if self.session.choice.mode is Mode.RANK else Mode.RANK
        )
        self.draw()

    def action_own(self) -> None:
        """Let the keys move the selection's own rank, or that of all targets again."""
        if not self.own and not self.session.own_targets:
            self.notify("there is no rank here that could be lowered", severity="warning", markup=False)
            return
        self.own = not self.own
        self.draw()

    def action_common(self) -> None:
        """The selection under the common rule again."""
        self._try(self.session.choice.without_own(self.session.selected.targets))

    def action_regroup(self) -> None:
        """By layer, or by module type."""
        self.session.by = "module" if self.session.by == "layer" else "layer"
        self.query_one(TargetTree).rebuild()
        self.draw()

    def action_filter(self) -> None:
        """Open the line for the filter."""
        line = self.query_one("#filter", Input)
        line.add_class("-open")
        line.focus()

    def action_leave(self) -> None:
        """Out of the filter, or out of own ranks."""
        line = self.query_one("#filter", Input)
        if line.has_class("-open"):
            line.value = ""
            line.remove_class("-open")
            self.query_one(TargetTree).focus()
        elif self.own:
            self.own = False
            self.draw()

    @on(Input.Changed, "#filter")
    def _narrow(self, event: Input.Changed) -> None:
        if event.value != self.session.pattern:
            self.session.pattern = event.value
            self.query_one(TargetTree).rebuild()
            self.draw()

    @on(Input.Submitted, "#filter")
    def _leave_filter(self, event: Input.Submitted) -> None:
        event.input.set_class(bool(event.value), "-open")
        self.query_one(TargetTree).focus()

    def action_save(self) -> None:
        """The dialog, unless there is nothing to save."""
        session, found = self.session, self.session.preview
        if found.refused is not None:
            self.notify(f"cannot be saved: {plain(found.refused)}", severity="error", markup=False)
        elif not found.changed:
            waiting = found.unmeasured and session.done < session.work
            why = "the ranks are not known yet" if waiting else "no target would get a lower rank; lower it first"
            self.notify(why, severity="warning", markup=False)
        else:
            self.push_screen(SaveScreen(Saving(session.adapter, session.base, session.choice), found))

    def action_help(self) -> None:
        """The keys."""
        self.push_screen(HelpScreen())

    def action_ground(self) -> None:
        """Light on dark, or dark on light."""
        self.theme = (LIGHT if self.current_theme.dark else DARK).name
        self.draw()
