"""What the cache holds, and clearing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.reports.cache import CachedBasis, CacheReport

if TYPE_CHECKING:
    from loratools.cache import Cache


def cached(cache: Cache, *, clear: bool = False) -> CacheReport:
    """What `cache` holds, the largest first; with `clear`, after removing all of it."""
    freed = cache.clear() if clear else None
    entries = tuple(CachedBasis(e.path.name, e.name, e.nbytes) for e in cache.entries())
    return CacheReport(str(cache.folder), entries, sum(e.bytes for e in entries), freed)
