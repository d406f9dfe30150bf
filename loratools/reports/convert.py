"""What a conversion did with every target and every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ConvertedTarget:
    """One target that was written: what it was made of, by which rule of naming, and what was done to it.

    `relative_error`: of the written delta, where it is an approximation; None where it is exact but for rounding.
    """

    sources: tuple[str, ...]
    rule: str
    family: str
    rank: int
    actions: tuple[str, ...] = ()
    relative_error: float | None = None


@dataclass(frozen=True)
class ConvertReport:
    """Every target that was written and what became of every key that was read.

    `keys`: how many keys of the input were read as updates, carried over as they are, and dropped. `notices`: code ->
    what a user should know.
    """

    source_format: str
    format: str
    model: str | None
    targets: Mapping[str, ConvertedTarget]
    keys: Mapping[str, int]
    dropped: Mapping[str, str]
    notices: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    warnings: tuple[str, ...] = ()
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
