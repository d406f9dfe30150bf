"""How far a long run is: on standard error, only on a terminal, only after two seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.families.base import Update

_SILENT_SECONDS: Final = 2.0
_BETWEEN_SECONDS: Final = 0.1


class Progress:
    """Counts the targets that an adapter reads, or the steps of other work, from whichever thread."""

    def __init__(self, *, stream: TextIO | None = None, silent: float = _SILENT_SECONDS) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._next = time.monotonic() + silent if self._stream.isatty() else float("inf")
        self._lock = threading.Lock()
        self._total = self._read = self._width = 0
        self._what = "targets"
        self._note = ""

    def steps(self, total: int, what: str) -> Callable[[], None]:
        """To be called after each of `total` things; what was counted before is over."""
        self._total, self._read, self._what, self._note = total, 0, what, ""
        return self._step

    def meter(self, total: int, what: str) -> Callable[[int], None]:
        """As `steps`, to be called with the tokens of each: the rate is shown, and what is left of the time."""
        step, began, tokens = self.steps(total, what), time.monotonic(), 0

        def measured(taken: int) -> None:
            nonlocal tokens
            tokens += taken
            elapsed = max(time.monotonic() - began, 1e-9)
            left = elapsed / (self._read + 1) * max(total - self._read - 1, 0)
            self._note = f", {tokens / elapsed:.0f} tokens/s, {_duration(left)} left"
            step()

        return measured

    def watch(self, adapter: Adapter) -> Adapter:
        """The same adapter, whose reading is counted."""
        if self._what != "targets":
            self._total, self._read, self._what, self._note = 0, 0, "targets", ""
        self._total += len(adapter.entries)
        entries = {t: replace(e, read=self._counted(e.read)) for t, e in adapter.entries.items()}
        return replace(adapter, entries=entries)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._next = float("inf")
            if self._width:
                self._write("")

    def _counted(self, read: Callable[[], Update]) -> Callable[[], Update]:
        def counted() -> Update:
            update = read()
            self._step()
            return update

        return counted

    def _step(self) -> None:
        with self._lock:
            self._read += 1
            self._draw()

    def _draw(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _BETWEEN_SECONDS
        turn, done = divmod(self._read - 1, self._total)  # spectra first and factors after are two turns
        self._write(f"{done + 1} of {self._total} {self._what}" + (f", turn {turn + 1}" if turn else "") + self._note)

    def _write(self, text: str) -> None:
        self._stream.write(f"\r{text:<{self._width}}" + ("" if text else "\r"))
        self._stream.flush()
        self._width = len(text)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
