"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re
from decimal import Decimal

from loratools.errors import UsageError

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """The whole bytes in a size such as "4096", "4MB" (4,000,000), "4 MiB" (4,194,304) or "1.5GB", rounded down."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a size; write for example 4096, 4MB, 4MiB or 1.5GB")
    number, unit = match.groups()
    if unit.lower() not in UNITS:
        hint = f"; did you mean {number}{unit}B or {number}{unit}iB?" if unit.lower() + "b" in UNITS else ""
        raise UsageError(f"{text!r} has an unknown unit; use B, kB, MB, GB, TB, KiB, MiB, GiB or TiB{hint}")
    size = int(Decimal(number) * UNITS[unit.lower()])
    if size < 1:
        raise UsageError(f"{text!r} is less than one byte")
    return size


def format_size(size: int) -> str:
    """A size to three digits in decimal units: "512 B", "4.00 MB", "12.3 GB"."""
    if abs(size) < 1000:
        return f"{size} B"
    value, unit = size / 1000, "kB"
    for larger in ("MB", "GB", "TB", "PB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"
