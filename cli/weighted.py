"""`PATH:WEIGHT`, as merge takes its adapters."""

from __future__ import annotations

import math
import re
from pathlib import Path

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def path_and_weight(text: str) -> tuple[Path, float]:
    """The path and the weight after its last colon, 1 where no number follows one.

    A colon that belongs to a path stays in it: that of `C:\\adapters`, and any in the name of something that exists.
    """
    head, _, tail = text.rpartition(":")
    if not head or not _NUMBER.fullmatch(tail) or Path(text).exists():
        return Path(text), 1.0
    weight = float(tail)
    if not math.isfinite(weight):
        from loratools.errors import UsageError

        raise UsageError(f"{text}: the weight is not finite; write one such as {head}:0.5")
    return Path(head), weight
