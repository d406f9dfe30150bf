"""The one place where results leave: a table for people, JSON for programs, or the output's path alone."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from loratools_cli.text import plain

if TYPE_CHECKING:
    from loratools.training.cost import Cost


class Report(Protocol):
    """What commands hand over."""

    def to_dict(self) -> dict[str, Any]: ...


class Mode(Enum):
    """For whom the output is."""

    TABLE = "table"
    JSON = "json"
    QUIET = "quiet"


class Output:
    """Shows one report: on standard output, warnings of a table on standard error, warnings of JSON inside it."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False, everything: bool = False) -> None:
        if as_json and quiet:
            from loratools.errors import UsageError

            raise UsageError("--json and --quiet exclude each other; give one of them")
        self.mode = Mode.JSON if as_json else Mode.QUIET if quiet else Mode.TABLE
        self.everything = everything

    def announce(self, find: Callable[[], Cost | None]) -> None:
        """Tell people what a run will take, where that is known."""
        if self.mode is Mode.TABLE and (cost := find()) is not None:
            say(cost.sentence)

    def show(self, report: Report, *, planned: Path | None = None) -> None:
        """Show `report`; `planned` is where a dry run would have written."""
        if self.mode is Mode.JSON:
            write(sys.stdout, json.dumps(_finite(report.to_dict())) + "\n")
        elif self.mode is Mode.QUIET:
            if path := planned or getattr(report, "output", None):
                write(sys.stdout, f"{path}\n")
        else:
            self._table(report, planned)

    def _table(self, report: Report, planned: Path | None) -> None:
        from loratools_cli.closing import closing
        from loratools_cli.render import table

        write(sys.stdout, table(report, sys.stdout, everything=self.everything))
        write(sys.stderr, "".join(f"warning: {plain(text)}\n" for text in getattr(report, "warnings", ())))
        write(sys.stdout, closing(report, planned))


def say(message: str) -> None:
    """One line on standard error."""
    with contextlib.suppress(Exception):  # there is nowhere left to say it
        write(sys.stderr, f"{plain(message)}\n")


def write(stream: TextIO, text: str) -> None:
    """Write and flush; a reader that has gone away (`| head`) is no error, a full disk is."""
    if not text:
        return
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        detach(stream)
    except OSError as error:
        from loratools.errors import OutputError

        detach(stream)
        name = "standard output" if stream is sys.stdout else "standard error"
        raise OutputError(f"{name}: cannot be written: {error.strerror}; free some space or write elsewhere") from error


def detach(stream: TextIO) -> None:
    """Let what is still buffered go nowhere, so that nothing fails when the interpreter flushes it at the end."""
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)
    except (OSError, ValueError):  # a stream without a descriptor has nothing to flush
        return


def _finite(value: Any) -> Any:
    """With null for the NaN and infinities that a config may hold: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
