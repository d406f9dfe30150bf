"""A file that appears at its destination complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, final

from loratools.errors import OutputError
from loratools.storage.header import quoted

_CHUNK: Final = 8 << 20  # small enough that Ctrl-C is answered promptly

_MARK: Final = 60  # characters, of four bytes at most: with what is added a name has to fit into 255

_REASONS: Final = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EFBIG: "the file would exceed the size limit (ulimit -f, or the file system's); raise it or write elsewhere",
    errno.EACCES: "permission denied; write to a folder of your own",
    errno.EPERM: "permission denied; write to a folder of your own",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.ENOTDIR: "a parent of it is a file; choose another path",
    errno.ENOENT: "its folder cannot be created here; write elsewhere",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


def refuse_existing(place: Path, *, force: bool) -> None:
    """OutputError where there is something at `place` already, unless it may be replaced, or it can be no place."""
    with explained(place):
        exists = place.exists()
    if exists and not force:
        raise OutputError(f"{printable(place)}: exists already; choose another output or pass --force")


def printable(path: Path) -> str:
    """The path for a message of one line: as it is, or in quotes where it would break the line."""
    text = str(path)
    return text if text.isprintable() else quoted(text, 400)


def temporary_beside(place: Path) -> Path:
    """A name that nothing has yet, beside `place`."""
    return place.parent / f".{temporary_mark(place.name)}.{secrets.token_hex(4)}.tmp"


def temporary_mark(name: str) -> str:
    """What tells whose a temporary file is: the name, or of a long one as much as fits and a hash."""
    if len(name) <= _MARK:
        return name
    return f"{name[: _MARK - 17]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


@final
class AtomicFile:
    """A temporary file beside `path`, put in place by `commit`, removed without trace by `abort`.

    Missing parent folders are made, and removed again by `abort`. A symbolic link at `path` is replaced, not
    followed: in a download cache it points at a blob that other folders share.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._final = path.absolute()
        self._temporary = temporary_beside(self._final)
        self._made: list[Path] = []
        self._fd = -1
        try:
            with explained(self.path):
                self._make_parents()
                self._refuse_what_is_no_file()
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._fd = os.open(self._temporary, flags, 0o666)
        except BaseException:
            self.abort()
            raise

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`; OutputError where that fails."""
        rest = memoryview(data)
        with explained(self.path):
            while rest:
                written = os.pwrite(self._fd, rest[:_CHUNK], offset)
                offset, rest = offset + written, rest[written:]

    def shift(self, start: int, end: int, by: int) -> None:
        """Move the bytes from `start` to `end` towards the end of the file, `by` > 0 bytes on."""
        while end > start:
            size = min(_CHUNK, end - start)
            with explained(self.path):
                data = os.pread(self._fd, size, end - size)
            self.write_at(end - size + by, data)
            end -= size

    def commit(self, size: int, *, durable: bool = True, named: bool = True) -> None:
        """Cut the file to `size` bytes, fsync it and put it in place; OutputError leaves the destination as it was.

        What is not `durable` is not fsynced: should the machine fail, there may be an older file, an empty one or none.
        Where its name need not be durable, for the folder is to be put in place itself, `named` is False.
        """
        try:
            with explained(self.path):
                os.ftruncate(self._fd, size)
                if durable:
                    os.fsync(self._fd)
                self._close()
                os.replace(self._temporary, self._final)
        except BaseException:
            self.abort()
            raise
        folders = [self._final.parent, *(folder.parent for folder in self._made)]
        self._made.clear()
        for folder in folders if durable and named else ():
            fsync_folder(folder)

    def abort(self) -> None:
        """Remove every trace; does nothing after `commit`, and nothing the second time."""
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()
        while self._made:
            with contextlib.suppress(OSError):  # somebody else has put a file there
                self._made.pop().rmdir()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _refuse_what_is_no_file(self) -> None:
        try:
            mode = os.stat(self._final).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            raise OutputError(f"{printable(self.path)}: is a folder; add a file name")
        if not stat.S_ISREG(mode):
            raise OutputError(f"{printable(self.path)}: is a device or a pipe; name a regular file")

    def _make_parents(self) -> None:
        missing = []
        folder = self._final.parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # made by somebody else meanwhile: not ours to remove
                folder.mkdir()
                self._made.append(folder)


def write_whole(place: Path, data: bytes, *, durable: bool = True) -> Path:
    """Put `data` in place; OutputError leaves what was there as it was. `durable` as `AtomicFile.commit`."""
    file = AtomicFile(place)
    try:
        file.write_at(0, data)
        file.commit(len(data), durable=durable)
    finally:
        file.abort()
    return place


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError that names `path` and a remedy."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, f"{error.strerror or error}; write elsewhere")
        raise OutputError(f"{printable(path)}: cannot be written: {reason}") from error


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the file system can."""
    with contextlib.suppress(OSError):  # the file is complete and in place; not every file system syncs folders
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
