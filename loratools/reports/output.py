"""Where a rendered report goes: one file, checked before anything is computed, and written whole or not at all."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from loratools.errors import MissingExtraError, UsageError
from loratools.storage.atomic import AtomicFile, printable, refuse_existing


def checked(path: str | os.PathLike[str], suffixes: Sequence[str], what: str, *, force: bool) -> Path:
    """`path`, where `what` can be written there.

    Raises UsageError for another suffix, and OutputError for what exists already, unless `force`, and for a place where
    nothing can be written.
    """
    place = Path(path)
    if place.suffix.lower() not in suffixes:
        plural = "one of these suffixes" if len(suffixes) > 1 else "this suffix"
        raise UsageError(f"{printable(place)}: {what} is written as {' or '.join(suffixes)}; choose {plural}")
    AtomicFile(place).abort()  # to try is the one sure way to know; it leaves no trace
    refuse_existing(place, force=force)
    return place


def require(module: str, *, extra: str, what: str) -> None:
    """MissingExtraError with the install line, unless `module` can be imported."""
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(f"{what} need {module}: pip install 'loratools[{extra}]'")
