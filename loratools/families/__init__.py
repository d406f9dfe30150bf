"""The parameterisations that loratools understands; the set of slots of a target picks one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import AdapterError
from loratools.families.base import Layout, Update
from loratools.families.dora import DoRA
from loratools.families.loha import LoHa
from loratools.families.lokr import LoKr
from loratools.families.lora import LoRA

if TYPE_CHECKING:
    from collections.abc import Collection

FAMILIES: tuple[type[Update], ...] = (LoRA, DoRA, LoHa, LoKr)

__all__ = ["FAMILIES", "DoRA", "Layout", "LoHa", "LoKr", "LoRA", "Update", "family_of"]


def family_of(slots: Collection[str]) -> type[Update]:
    """The one family with these slots; AdapterError says what is missing, or what no family has."""
    found = set(slots)
    fits = [f for f in FAMILIES if f.required <= found <= f.required | f.optional]
    if len(fits) == 1:
        return fits[0]
    closest = min(FAMILIES, key=lambda f: len(found ^ f.required))
    missing, extra = sorted(closest.required - found), sorted(found - closest.required - closest.optional)
    problem = f"{', '.join(missing)} missing" if missing else f"unexpected {', '.join(extra)}"
    raise AdapterError(f"not a complete {closest.family} update: {problem} (it has {', '.join(sorted(found))})")
