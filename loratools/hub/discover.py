"""The adapters of a hub, from a walk through its folders; nothing is read but names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loratools.errors import InputError
from loratools.files import SUFFIXES, WEIGHTS_NAMES
from loratools.storage.atomic import printable

_DEPTH: Final = 64  # of folders in each other: hubs have a few
_PACK: Final = b'{"format":"loratools pack"'


@dataclass(frozen=True)
class Found:
    """One place where an adapter seems to lie: a folder, or a lone weights file; `name` is its path within the hub."""

    name: str
    path: Path

    @property
    def stem(self) -> str:
        """What its outputs are called."""
        return self.name.removesuffix(".safetensors")


@dataclass(frozen=True)
class Refused:
    """A place that is not looked into, and why."""

    name: str
    reason: str


def discover(hub: Path, *, without: Path | None = None) -> Iterator[Found | Refused]:
    """Every folder and lone file that could be an adapter, in the order of their names; `without` is passed over.

    Symbolic links are not followed out of the hub, nor into folders. Hidden folders and files are passed over. A folder
    in it that cannot be read is refused. Raises InputError where `hub` itself is no folder that can be read.
    """
    if not hub.is_dir():
        raise InputError(f"{printable(hub)}: is no folder of adapters")
    if is_pack(hub):
        raise InputError(f"{printable(hub)}: is a pack; `loratools hub ls` lists it, `loratools hub unpack` opens it")
    try:
        os.scandir(hub).close()
    except OSError as error:
        raise InputError(f"{printable(hub)}: cannot be read: {error.strerror}") from error
    inside = hub.resolve()
    yield from _walk(hub, "", inside, None if without is None else _name_within(inside, without.resolve()))


def _name_within(inside: Path, place: Path) -> str | None:
    if not place.is_relative_to(inside):
        return None
    return "" if place == inside else place.relative_to(inside).as_posix()


def _walk(folder: Path, name: str, inside: Path, without: str | None) -> Iterator[Found | Refused]:
    """What lies in one folder, whose own name within the hub is `name`."""
    if name == without:
        return
    if name.count("/") >= _DEPTH:
        yield Refused(name, f"lies deeper than {_DEPTH} folders")
        return
    if name and is_pack(folder):
        yield Refused(name, "a pack, whose adapters `loratools hub unpack` writes")
        return
    try:
        with os.scandir(folder) as there:
            entries = sorted((e for e in there if not e.name.startswith(".")), key=lambda e: e.name)
    except (FileNotFoundError, NotADirectoryError):  # gone since its own folder was read
        return
    except OSError as error:
        yield Refused(name, f"cannot be read: {error.strerror}")
        return
    files = [e.name for e in entries if not e.is_symlink() or _stays(Path(e.path), inside)]
    whole = any(weights in files for weights in WEIGHTS_NAMES) and name != ""
    if whole:
        yield Found(name, folder)
    for entry in entries:
        own = f"{name}/{entry.name}" if name else entry.name
        if entry.is_symlink() and not _stays(Path(entry.path), inside):
            yield Refused(own, "a symbolic link that leads out of the hub, or nowhere")
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), own, inside, without)
        elif entry.is_dir():
            yield Refused(own, "a symbolic link to a folder of the hub, which is found by its own name")
        elif not whole and is_weights(entry.name) and entry.is_file():
            yield Found(own, Path(entry.path))


def is_pack(folder: Path) -> bool:
    """Whether `hub pack` wrote a folder, by the first bytes of its index."""
    try:
        with (folder / "index.json").open("rb") as file:
            return file.read(len(_PACK)) == _PACK
    except OSError:
        return False


def _stays(path: Path, inside: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(inside)
    except (OSError, RuntimeError):  # a loop
        return False


def is_weights(name: str) -> bool:
    """Whether a file of this name could hold an adapter."""
    return name.endswith((*SUFFIXES, ".safetensors.index.json"))
