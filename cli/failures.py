"""From an exception to one line and an exit status."""

from __future__ import annotations

import errno
from typing import Any, Final

import typer

from loratools_cli.exit_codes import ExitCode

# ClickException, which Typer does not export and which moved from click into Typer with its version 0.26.
COMMAND_LINE_ERROR: Final[Any] = typer.BadParameter.__mro__[2]

_OUTPUT_ERRNOS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def explain(error: Exception) -> tuple[int, str]:
    """The exit status of an exception, and what to say about it."""
    if isinstance(error, COMMAND_LINE_ERROR):
        return ExitCode.USAGE, _usage(error)
    from loratools.errors import LoratoolsError

    if isinstance(error, LoratoolsError):
        return error.exit_code, str(error)
    if _is_out_of_memory(error):
        return ExitCode.ADAPTER, "out of memory; use a larger machine, or do less at once with --batch or --target"
    if isinstance(error, OSError):
        return _system(error)
    remedy = "this is an error in loratools; set LORATOOLS_DEBUG=1 for the traceback and report it"
    return ExitCode.INTERNAL, f"{type(error).__name__}: {error}; {remedy}"


def _usage(error: Any) -> str:
    message = str(error.format_message()).rstrip(".").replace(": Value error, ", ": ")  # Typer says so of choices
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path} --help" if context else message


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _system(error: OSError) -> tuple[int, str]:
    where = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in _OUTPUT_ERRNOS:
        return ExitCode.OUTPUT, f"{where}cannot be written: {reason}; free some space or write elsewhere"
    return ExitCode.INPUT, f"{where}{reason}; check the path and its permissions"
