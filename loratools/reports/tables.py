"""What can be read and written: the tables of dialects and families as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Dialect:
    """One dialect; `writes` are the families that a conversion can write in it, none for one that is only read."""

    summary: str
    writes: tuple[str, ...]


@dataclass(frozen=True)
class FormatsReport:
    """The dialects, by name."""

    formats: Mapping[str, Dialect]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Family:
    """One family of updates."""

    summary: str
    slots: tuple[str, ...]
    needs_base: bool
    squeezable: bool
    written_by: tuple[str, ...]


@dataclass(frozen=True)
class FamiliesReport:
    """The families, by name."""

    families: Mapping[str, Family]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
