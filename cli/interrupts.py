"""Signals that ask to stop, answered by unwinding, so that temporaries are removed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Final

from loratools_cli.output import say

# A terminal sends one Ctrl-C to several processes and people press it twice: repeats must not disturb the cleaning up.
_DEAF_SECONDS: Final = 2.0
_SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A class of its own: a plain one that passes through exec("...") makes CPython die of SIGINT at the very end."""


@contextmanager
def resumable() -> Iterator[None]:
    """Tell who interrupts the block how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        say("what is done is kept: the same command with --resume goes on")
        raise


class Interrupts:
    """While it is entered, SIGINT, SIGTERM and SIGHUP raise Interrupted; what is ignored (nohup) stays so."""

    def __init__(self) -> None:
        self.received = False
        self._last = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self._last < _DEAF_SECONDS:
            return
        self.received, self._last = True, now
        raise Interrupted
