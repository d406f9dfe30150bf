"""A folder that appears at its destination complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import final

from loratools.storage.atomic import explained, fsync_folder, temporary_beside


@final
class AtomicFolder:
    """A temporary folder beside `path`; `commit` puts it in place, leaving the block without it removes every trace.

    Files of an existing folder at `path` that were not written anew are carried into the new one, so that replacing an
    adapter keeps the tokenizer and the notes beside it; unless `carry` is off. A symbolic link at `path` is replaced,
    not followed.

    With `shared` a folder at `path` stays, for others may be at work in it: files are put into it one by one, each
    whole, `last` after the others; where nothing lies there, the folder is put in place as otherwise.
    """

    def __init__(self, path: Path, *, carry: bool = True, shared: bool = False, last: str = "") -> None:
        self.path = path
        self._carry = carry
        self._shared, self._last = shared, last
        self._final = path.absolute()
        self.temporary = temporary_beside(self._final)
        self._retired = self.temporary.with_suffix(".old")
        self._made: list[Path] = []

    def __enter__(self) -> AtomicFolder:
        try:
            with explained(self.path):
                missing = [p for p in (self._final.parent, *self._final.parent.parents) if not p.exists()]
                for parent in reversed(missing):
                    with contextlib.suppress(FileExistsError):  # made by somebody else meanwhile: not ours to remove
                        parent.mkdir()
                        self._made.append(parent)
                self.temporary.mkdir()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._remove()

    def write_text(self, name: str, text: str) -> None:
        """Write and fsync a small file; OutputError where that fails."""
        with explained(self.path), open(self.temporary / name, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Put the folder in place; OutputError leaves the destination as it was, but for files of a `shared` one."""
        with explained(self.path):
            if not self._shared and self._final.is_dir():
                for item in self._final.iterdir() if self._carry else ():
                    _carry_over(item, self.temporary / item.name)
                self._final.rename(self._retired)
            try:
                fsync_folder(self.temporary)
                self.temporary.rename(self._final)  # of folders it replaces an empty one alone
            except OSError:
                if not self._shared:
                    raise
                self._put_files()
        folders = [self._final.parent, *(folder.parent for folder in self._made)]
        self._made.clear()
        for folder in folders:
            fsync_folder(folder)

    def _put_files(self) -> None:
        if self._final.is_symlink():
            self._final.unlink()
        self._final.mkdir(exist_ok=True)
        for item in sorted(self.temporary.iterdir(), key=lambda item: (item.name == self._last, item.name)):
            os.replace(item, self._final / item.name)
        fsync_folder(self._final)

    def _remove(self) -> None:
        if self._retired.exists() and not self._final.exists():  # interrupted between the two renames
            self._retired.rename(self._final)
        if self._retired.is_symlink():  # what it points at is not ours
            self._retired.unlink()
        shutil.rmtree(self._retired, ignore_errors=True)
        shutil.rmtree(self.temporary, ignore_errors=True)
        while self._made:
            with contextlib.suppress(OSError):  # somebody else has put a file there
                self._made.pop().rmdir()


def _carry_over(item: Path, destination: Path) -> None:
    if destination.exists():
        return
    if item.is_dir() and not item.is_symlink():
        destination.mkdir()
        for child in item.iterdir():
            _carry_over(child, destination / child.name)
        return
    try:
        os.link(item, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(item, destination, follow_symlinks=False)
