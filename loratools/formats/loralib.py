"""Bare `lora_A` and `lora_B` without a config: loralib, DyLoRA, and MatryoshkaLoRA, which transposes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import AdapterError, InputError, UsageError
from loratools.families.base import Layout
from loratools.formats.base import (
    Declaration,
    Format,
    Header,
    Hints,
    NestedScaling,
    Part,
    ScaleMode,
    Written,
    check_plain,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_SLOTS = {"lora_A": "down", "lora_B": "up"}
_SUFFIXES = {slot: suffix for suffix, slot in _SLOTS.items()}


@final
@dataclass(frozen=True)
class Loralib(Format):
    """Neither alpha nor, for MatryoshkaLoRA, the scaling of ranks is in the file: they come from the user or stay open.

    loralib and DyLoRA: A (r, n), B (m, r), scale alpha / r. MatryoshkaLoRA: A (n, r), B (r, m), scale 1, 1 / r or
    1 / sqrt(r).
    """

    name: ClassVar[str] = "loralib"

    keys: Mapping[str, Mapping[str, str]]
    alpha: float | None
    scaling: NestedScaling | None
    transposed: bool
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return header.config is None and any(key.rpartition(".")[2] in _SLOTS for key in header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Loralib:
        keys: dict[str, dict[str, str]] = {}
        extras = []
        for key in header.specs:
            target, _, leaf = key.rpartition(".")
            if leaf in _SLOTS:
                keys.setdefault(target, {})[_SLOTS[leaf]] = key
            else:
                extras.append(key)
        transposed = _is_transposed(header, keys)
        warnings = []
        if transposed and hints.scaling is None:
            warnings.append(
                "a MatryoshkaLoRA file does not state how ranks are scaled: norms are for scale 1; pass --scaling"
            )
        if not transposed and hints.alpha is None:
            warnings.append("the file does not state alpha: norms are for alpha 1; state it with --alpha")
        return cls(keys, hints.alpha, hints.scaling, transposed, tuple(extras), {}, tuple(warnings))

    def as_lora(self, parts: Mapping[str, Part], extras: tuple[str, ...]) -> Loralib:
        check_plain(parts, self.name)
        for target, part in parts.items():
            if set(part.slots) != {"down", "up"} or part.layout.transposed:
                raise AdapterError(f"{target}: the dialect {self.name} holds plain factors only; write PEFT instead")
        keys = {
            target: {slot: self.keys.get(target, {}).get(slot, f"{target}.{_SUFFIXES[slot]}") for slot in part.slots}
            for target, part in parts.items()
        }
        return replace(self, keys=keys, extras=extras)

    def spell(self, target: str, slot: str) -> str:
        return f"{target}.{_SUFFIXES[slot]}"

    def layout(self, target: str) -> Layout:
        return Layout()

    def scale_key(self, target: str) -> str | None:
        return None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        if not self.transposed:
            return (1.0 if self.alpha is None else self.alpha) / rank
        return {"none": 1.0, "rank": 1.0 / rank, "sqrt": 1.0 / math.sqrt(rank), None: 1.0}[self.scaling]

    def writable_scale(self, target: str, rank: int, scale: float, mode: ScaleMode) -> float:
        return self.scale(target, rank, None)

    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        for target, w in written.items():
            if not math.isclose(self.scale(target, w.rank, None), w.scale, rel_tol=1e-12):
                raise UsageError(f"{target}: this dialect has no place for the scale {w.scale:g} at rank {w.rank}")
        return Declaration(None, metadata)

    def parameter(self, target: str) -> str:
        return f"{target}.weight"

    @property
    def nested_scaling(self) -> NestedScaling | None:
        return (self.scaling or "none") if self.transposed else None

    def is_stored_transposed(self, target: str) -> bool:
        return self.transposed

    def without_mutation(self) -> Loralib:
        return self

    def replacements(self) -> Mapping[str, str]:
        return {}


def _is_transposed(header: Header, keys: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether the factors chain only as (n, r) @ (r, m); what chains both ways follows the other targets."""
    plain = swapped = 0
    for slots in keys.values():
        if len(slots) == 2:
            a, b = header.specs[slots["down"]].shape, header.specs[slots["up"]].shape
            if len(a) == len(b) == 2:
                plain += a[0] == b[1] and a[1] != b[0]
                swapped += a[1] == b[0] and a[0] != b[1]
    if plain and swapped:
        raise InputError(f"{header.path}: some factors are stored as (r, n) and some as (n, r); split the file")
    return swapped > 0
