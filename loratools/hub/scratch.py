"""Private folders for copies, and what killed processes left of theirs."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_PREFIX: Final = "loratools-hub-"
_YOUNG: Final = 60.0  # seconds, in which a folder may have been made and not locked yet


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that nobody else can read, removed afterwards; locked meanwhile, so that `sweep` lets it be."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(folder)


def sweep() -> None:
    """Remove such folders of ours whose process has died."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            folder = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                about = os.fstat(folder)
                if about.st_uid == os.geteuid() and time.time() - about.st_mtime > _YOUNG:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: at work
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(folder)
