"""The dialog that saves a squeezed copy."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Button, Checkbox, Input, Static

from loratools.errors import LoratoolsError
from loratools_cli.explorer.figures import figure, share, size
from loratools_cli.explorer.saving import Saving, StoppedError
from loratools_cli.failures import explain
from loratools_cli.text import plain

if TYPE_CHECKING:
    from loratools.reports.preview import Preview
    from loratools.reports.squeeze import SqueezeReport

_BAR: Final = 40


class SaveScreen(ModalScreen[None]):
    """Asks where, writes on a thread of its own, and says what came of it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Cancel")]
    DEFAULT_CSS = """
    SaveScreen { align: center middle; }
    SaveScreen > Vertical {
        width: 76; max-width: 100%; height: auto; max-height: 100%;
        border: round $primary; background: $panel; padding: 0 1; border-title-color: $primary;
    }
    SaveScreen Static { height: auto; margin-bottom: 1; }
    SaveScreen Input { border: round $border; background: $surface; }
    SaveScreen Input:focus { border: round $primary; }
    SaveScreen Checkbox { border: none; background: $panel; height: 1; padding: 0; margin-bottom: 1; }
    SaveScreen Horizontal { height: 3; align-horizontal: right; }
    SaveScreen Button { margin-left: 2; }
    """

    class Progress(Message):
        """So many targets were read."""

        def __init__(self, read: int) -> None:
            super().__init__()
            self.read = read

    class Ended(Message):
        """A report, or what went wrong."""

        def __init__(self, report: SqueezeReport | None, problem: str = "") -> None:
            super().__init__()
            self.report, self.problem = report, problem

    def __init__(self, saving: Saving, expected: Preview) -> None:
        super().__init__()
        self.saving, self.expected = saving, expected
        self.report: SqueezeReport | None = None
        self.problem = ""
        self._stop: threading.Event | None = None  # while something is being written

    def compose(self) -> ComposeResult:
        frame = Vertical(
            Static(self._summary(), id="summary"),
            Input(str(self.saving.proposal), id="path"),
            Checkbox("Replace what is there", id="force"),
            Static("", id="message"),
            Horizontal(Button("Save", id="save", variant="primary"), Button("Cancel", id="cancel")),
        )
        frame.border_title = Content("Save a squeezed copy")
        yield frame

    def on_unmount(self) -> None:
        if self._stop is not None:
            self._stop.set()

    def action_cancel(self) -> None:
        """Stop the writing, or else close."""
        if self._stop is None:
            self.dismiss()
        else:
            self._stop.set()

    @on(Button.Pressed, "#cancel")
    def _cancel(self) -> None:
        self.action_cancel()

    @on(Button.Pressed, "#save")
    @on(Input.Submitted)
    def _save(self) -> None:
        if self._stop is not None or self.report is not None:
            return
        force = self.query_one("#force", Checkbox).value
        try:
            place = self.saving.place(self.query_one("#path", Input).value, force=force)
        except (LoratoolsError, OSError, ValueError, RuntimeError) as error:  # expanduser: RuntimeError
            self._fail(explain(error)[1])
            return
        self._stop = threading.Event()
        for selector in ("#path", "#force", "#save"):
            self.query_one(selector).disabled = True
        self.query_one("#cancel", Button).label = "Stop"
        self._show_progress(0)
        stop = self._stop
        self.run_worker(lambda: self._write(place, force, stop), thread=True, exit_on_error=False)

    def _write(self, place: Path, force: bool, stop: threading.Event) -> None:
        """On a thread of its own."""
        count = 0

        def read() -> None:
            nonlocal count
            if stop.is_set():
                raise StoppedError
            count += 1
            self.post_message(self.Progress(count))

        try:
            ended = self.Ended(self.saving.write(place, force=force, read=read))
        except StoppedError:
            ended = self.Ended(None, "stopped; nothing was written")
        except Exception as error:  # noqa: BLE001 - shown, whatever it is: a dialog must not end in a traceback
            ended = self.Ended(None, explain(error)[1])
        self.post_message(ended)

    @on(Progress)
    def _show_read(self, message: Progress) -> None:
        self._show_progress(message.read)

    def _show_progress(self, read: int) -> None:
        total = 2 * len(self.expected.targets)  # spectra first, factors after
        filled = _BAR * min(read, total) // max(1, total)
        bar = (("━" * filled, "$accent"), ("━" * (_BAR - filled), "$faint"))
        self._message.update(Content.assemble(("writing  ", "$secondary"), *bar))

    @on(Ended)
    def _end(self, message: Ended) -> None:
        self._stop = None
        if message.report is None:
            for selector in ("#path", "#force", "#save"):
                self.query_one(selector).disabled = False
            self.query_one("#cancel", Button).label = "Cancel"
            self._fail(message.problem)
            return
        self.report = message.report
        self.query_one("#save").display = self.query_one("#force").display = False
        close = self.query_one("#cancel", Button)
        close.label = "Close"
        close.focus()
        self._message.update(_told(message.report))

    def _fail(self, problem: str) -> None:
        self.problem = problem
        self._message.update(Content.styled(plain(problem), "$error"))

    @property
    def _message(self) -> Static:
        return self.query_one("#message", Static)

    def _summary(self) -> Content:
        found = self.expected
        carried = sum("NaN" in (one.unchanged or "") for one in found.targets.values())
        parts: list[str | tuple[str, str]] = [
            (f"{size(found.bytes_before)} → {size(found.bytes_after)}", "bold"),
            f"   {share(found.energy_kept)} of the energy",
            f"\n{found.changed} of {len(found.targets)} targets get a lower rank",
        ]
        if carried:
            parts.append((f"\n{carried} with NaN or infinity carried over as they are", "$warning"))
        return Content.assemble(*parts)


def _told(report: SqueezeReport) -> Content:
    """What a finished save reports."""
    total = report.total
    sizes = f"{size(int(total['bytes_before']))} → {size(int(total['bytes_after']))}"
    of = share(total["bytes_after"] / total["bytes_before"])
    parts: list[str | tuple[str, str]] = [
        ("saved  ", "bold $success"),
        f"{sizes}, {of} of it\n",
        f"error as stored {figure(total['relative_error'])}, over the {total['changed']} targets that changed",
    ]
    parts += [(f"\n{plain(warning)}", "$warning") for warning in report.warnings[:3]]
    return Content.assemble(*parts)
