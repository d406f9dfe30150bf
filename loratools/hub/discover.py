"""The adapters of a hub, from a walk through its folders; nothing is read but names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import InputError
from loratools.files import SUFFIXES, WEIGHTS_NAMES
from loratools.storage.atomic import printable


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

    Symbolic links are not followed out of the hub, nor into folders. Hidden folders and files are passed over. Raises
    InputError where `hub` is no folder that can be read.
    """
    if not hub.is_dir():
        raise InputError(f"{printable(hub)}: is no folder of adapters")
    try:
        inside = hub.resolve()
        yield from _walk(hub, "", inside, None if without is None else _name_within(inside, without.resolve()))
    except PermissionError as error:
        raise InputError(f"{printable(Path(str(error.filename or hub)))}: permission denied") from error


def _name_within(inside: Path, place: Path) -> str | None:
    if not place.is_relative_to(inside):
        return None
    return "" if place == inside else place.relative_to(inside).as_posix()


def _walk(folder: Path, name: str, inside: Path, without: str | None) -> Iterator[Found | Refused]:
    """What lies in one folder, whose own name within the hub is `name`."""
    if name == without:
        return
    try:
        entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)
    except (FileNotFoundError, NotADirectoryError):  # gone since its own folder was read
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


def _stays(path: Path, inside: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(inside)
    except (OSError, RuntimeError):  # a loop
        return False


def is_weights(name: str) -> bool:
    """Whether a file of this name could hold an adapter."""
    return name.endswith((*SUFFIXES, ".safetensors.index.json"))
