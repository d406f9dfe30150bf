"""The numbers that settings state, which another program may have written: checked before anything is made of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from loratools.errors import AdapterError

if TYPE_CHECKING:
    from loratools.families.base import Settings

SEEDS = (-(2**63), 2**64 - 1)  # that torch's generator takes
WIDEST = 2**22  # a side of a weight: sixteen times the largest vocabularies
LONGEST = 2**31  # numbers that are drawn together


def whole_of(settings: Settings, name: str, least: int = 0, most: int = LONGEST) -> int:
    """A whole number from `least` to `most`; AdapterError where the settings state none."""
    return _whole(settings.get(name), name, least, most)


def seed_of(settings: Settings) -> int:
    """The seed of random numbers of torch; AdapterError where none is stated."""
    return _whole(settings.get("seed"), "seed", *SEEDS)


def number_of(settings: Settings, name: str) -> float | None:
    """A finite number, None where the settings do not state it; AdapterError where it is anything else."""
    value = settings.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise AdapterError(f"its settings state {value!r} for {name}, which is no finite number")
    return float(value)


def sides_of(settings: Settings, name: str) -> tuple[int, ...]:
    """Sides of weights, or of the tensors that make them up; AdapterError where the settings state none."""
    stated = settings.get(name)
    if not isinstance(stated, list | tuple) or not stated:
        raise AdapterError(f"its settings state {stated!r} for {name}, which is no list of sizes")
    return tuple(_whole(side, name, 1, WIDEST) for side in stated)


def _whole(value: Any, name: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise AdapterError(f"its settings state {value!r} for {name}, which is no whole number from {least} to {most}")
    return value
