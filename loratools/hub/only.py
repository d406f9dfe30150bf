"""Which adapters of a hub a run is for: names, or patterns of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import Protocol, TypeVar

from loratools.errors import InputError, UsageError
from loratools.storage.atomic import printable
from loratools.storage.header import quoted

SUFFIX = ".safetensors"
_SPECIAL = "*?["


class Named(Protocol):
    """Something with a name within a hub."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Only:
    """Some adapters: those whose names match a pattern of `globs`, in which * matches / too, and those of `names`.

    A name stands for the adapter that is called so, or where there is none, for one that differs by .safetensors.
    """

    globs: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def chosen(self, places: Sequence[T], hub: str) -> list[T]:
        """These of the places, in their order; UsageError for a pattern or a name that none of them has."""
        there = {place.name for place in places}
        stems: dict[str, list[str]] = {}
        for name in there:
            stems.setdefault(name.removesuffix(SUFFIX), []).append(name)
        wanted: set[str] = set()
        strangers = []
        for name in self.names:
            found = [name] if name in there else stems.get(name.removesuffix(SUFFIX), [])
            wanted.update(found)
            if not found:
                strangers.append(name)
        for glob in self.globs:
            matches = re.compile(translate(glob)).match
            matching = [n for n in there if matches(n) or matches(n.removesuffix(SUFFIX))]
            wanted.update(matching)
            if not matching:
                strangers.append(glob)
        if strangers:
            more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            raise UsageError(f"{hub}: holds no {quoted(strangers[0])}{more}; `loratools hub ls` names all")
        return [place for place in places if place.name in wanted]


def only_of(globs: Sequence[str], file: Path | None) -> Only | None:
    """What `--only` and `--only-from` say, None for nothing; a file has one name a line.

    InputError for a file that cannot be read or names nothing, UsageError for an empty pattern.
    """
    if file is None and not globs:
        return None
    if not all(globs):
        raise UsageError("--only '': give a name, or a pattern such as 'law/*'")
    return Only(tuple(globs), () if file is None else _read_names(file))


def _read_names(file: Path) -> tuple[str, ...]:
    try:
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise InputError(f"{printable(file)}: cannot be read: {error.strerror}") from error
    names = tuple(name for line in text.split("\n") if (name := line.removesuffix("\r")))
    if not names:
        raise InputError(f"{printable(file)}: names no adapter; write one name a line")
    return names


def written_names(names: Iterable[str]) -> bytes:
    """What `--only-from` reads as these names."""
    return "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")


def fits_a_line(name: str) -> bool:
    """Whether a name can stand in a file for `--only-from`."""
    return not {"\n", "\r"} & set(name)


def glob_of(name: str) -> str:
    """The pattern for a name, printable whatever is in it: `?` stands for what no terminal should show."""
    return "".join(f"[{c}]" if c in _SPECIAL else c if c.isprintable() else "?" for c in name)
