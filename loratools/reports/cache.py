"""What is kept of base models between runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CachedBasis:
    """The singular vectors of one weight; `name` is the parameter it was first met as."""

    file: str
    name: str
    bytes: int


@dataclass(frozen=True)
class CacheReport:
    """The folder, what is in it, and the bytes that clearing it freed, where it was cleared."""

    folder: str
    entries: tuple[CachedBasis, ...]
    bytes: int
    freed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
