"""What can be read and written: the tables of dialects and families as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
    """One family of updates.

    `base` says what its delta needs of the base weight: `no`, `shape`, `yes`; or `fit`, where only the encoder needs
    it. Those in which any delta can be written have a `guarantee` (exact, optimal or local), the `formula` of the
    delta, the `count` of stored numbers, the source, and the `options` of the encoder with their defaults;
    `most_entries` is the size of a matrix up to which a fit is feasible, None for any, and `reconstruction` what no
    source tells.
    """

    summary: str
    slots: tuple[str, ...]
    needs_base: bool
    base: str
    squeezable: bool
    written_by: tuple[str, ...]
    guarantee: str = ""
    formula: str = ""
    count: str = ""
    paper: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    most_entries: int | None = None
    reconstruction: str = ""
    notes: str = ""


@dataclass(frozen=True)
class FamiliesReport:
    """The families, by name."""

    families: Mapping[str, Family]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
