"""What a transfer has done so far, as files that people can read and edit: rows of JSON, and one record of stages."""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.errors import InputError, UsageError
from loratools.storage.atomic import explained, printable, write_whole

RECORD = "stages.json"
FIGURES = "figures.json"


@dataclass(frozen=True)
class StageFiles:
    """A work folder. Each stage notes what it was made from: its settings, and the digest of the files before it.

    A stage that is done is done again when that has changed, as it does where somebody edits a file before it; the
    stage's own files may be edited, and are then what the next one reads.
    """

    folder: Path

    @property
    def has_begun(self) -> bool:
        """Whether an earlier run has left its record here."""
        return (self.folder / RECORD).is_file()

    @contextmanager
    def open(self, stale: Sequence[str] = (), *, resume: bool, force: bool = False) -> Iterator[None]:
        """Make the folder, and have it for oneself within the block.

        UsageError where another process is at work in it, or an earlier run has left stages and nobody said what to do
        with them. With `force` alone that run's record and its files called `stale` are removed, and nothing else that
        lies there.
        """
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._lock(folder)
            if self.has_begun and not resume:
                if not force:
                    raise UsageError(
                        f"{printable(self.folder)}: holds an earlier run; pass --resume to go on with it, or --force "
                        "to begin anew"
                    )
                self.remove(*stale, FIGURES, RECORD)
            yield
        finally:
            os.close(folder)

    def _lock(self, folder: int) -> None:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{printable(self.folder)}: another run is at work here; wait for it, or choose another folder"
            ) from None
        except OSError:
            return  # not every file system has locks

    def is_done(self, stage: str, made_from: str) -> bool:
        """Whether the stage is complete, and was made from the same."""
        return self._record().get(stage) == {"made_from": made_from, "done": True}

    def is_begun(self, stage: str, made_from: str) -> bool:
        """Whether what the stage has left so far was made from the same."""
        return self._record().get(stage, {}).get("made_from") == made_from

    def note(self, stage: str, made_from: str, *, done: bool) -> None:
        """Write down that a stage has begun, or is complete."""
        record = {**self._record(), stage: {"made_from": made_from, "done": done}}
        write_whole(self.folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())

    def stages(self) -> tuple[str, ...]:
        """Those that are done."""
        return tuple(name for name, noted in self._record().items() if noted.get("done"))

    def digest(self, *names: str, settings: object = None) -> str:
        """Of settings and of the files so called as they are now."""
        found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
        for name in names:
            path = self.folder / name
            found.update(b"\0" + name.encode() + b"\0")
            if path.is_file():
                found.update(path.read_bytes())
        return found.hexdigest()

    def rows(self, name: str, unfit: Callable[[dict[str, Any]], str] = lambda row: "") -> list[dict[str, Any]]:
        """The rows of a file, none where it is not there; InputError names a line that is none, or is `unfit`: why.

        What a killed run left of a last line does not count, nor do fields that are null.
        """
        path = self.folder / name
        try:
            text = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError):
            raise InputError(f"{printable(path)}: cannot be read as UTF-8 text") from None
        found = []
        *lines, last = text.split("\n")
        for number, line in enumerate([*lines, *([last] if _row(last) else [])], 1):
            if not line.strip():
                continue
            row = _row(line)
            if row is None or not isinstance(row.get("prompt"), str):
                raise InputError(f'{printable(path)}, line {number}: is no row such as {{"prompt": "..."}}')
            row = {key: value for key, value in row.items() if value is not None}
            if why := unfit(row):
                raise InputError(f"{printable(path)}, line {number}: {why}; mend or remove it")
            found.append(row)
        return found

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put rows in place of a file, whole or not at all."""
        write_whole(self.folder / name, _lines(rows))

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a batch of rows at the end of a file, and see it on disk; what a killed run left half is cut off."""
        path = self.folder / name
        with explained(path), path.open("a+b") as file:
            file.seek(0)
            data = file.read()
            tail = data[data.rfind(b"\n") + 1 :].decode("utf-8", "replace")
            if tail and _row(tail):
                file.write(b"\n")  # an editor that ends no line
            else:
                file.truncate(len(data) - len(data[data.rfind(b"\n") + 1 :]))
            file.write(_lines(rows))
            file.flush()
            os.fsync(file.fileno())

    def figures(self, stage: str) -> dict[str, Any]:
        """What a stage has noted of itself."""
        return dict(self._read(FIGURES).get(stage, {}))

    def note_figures(self, stage: str, **figures: Any) -> None:
        """Note figures of a stage, in place of those of the same names."""
        every = self._read(FIGURES)
        every[stage] = {**every.get(stage, {}), **figures}
        write_whole(self.folder / FIGURES, (json.dumps(every, indent=1) + "\n").encode())

    def remove(self, *names: str) -> None:
        """Remove files, where they are."""
        with explained(self.folder):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def _record(self) -> dict[str, Any]:
        return self._read(RECORD)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{printable(path)}: cannot be read: {error}; begin anew with --force") from None
        if not isinstance(found, dict) or not all(isinstance(noted, dict) for noted in found.values()):
            raise InputError(f"{printable(path)}: is no record of stages; begin anew with --force")
        return found


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode("utf-8", "surrogatepass")
