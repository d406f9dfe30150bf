"""Bare `lora_A` and `lora_B` without a config: loralib, DyLoRA, and MatryoshkaLoRA, which transposes them."""

from __future__ import annotations

import math
import re
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
from loratools.formats.layouts import whisper
from loratools.formats.litgpt import LitGPT
from loratools.formats.modules import Placement, lone

if TYPE_CHECKING:
    from collections.abc import Mapping

_SLOTS = {"lora_A": "down", "lora_B": "up"}
_MERGED = {"lora_A": "merged_down", "lora_B": "merged_up"}
_SUFFIXES = {slot: suffix for table in (_SLOTS, _MERGED) for suffix, slot in table.items()}
_OTHERS = re.compile(r"\.loras\.")  # AdapterHub's


@final
@dataclass(frozen=True)
class Loralib(Format):
    """Neither alpha nor, for MatryoshkaLoRA, the scaling of ranks is in the file: they come from the user or stay open.

    loralib and DyLoRA: A (r, n), B (m, r), scale alpha / r. loralib's MergedLinear: A (g * r, n), B (g blocks of rows,
    r), of the g fused projections that `enable_lora` names. MatryoshkaLoRA: A (n, r), B (r, m), scale 1, 1 / r or
    1 / sqrt(r). A base of the transposed shape says that a weight is transposed (fan_in_fan_out, embeddings).
    """

    name: ClassVar[str] = "loralib"

    keys: Mapping[str, Mapping[str, str]]
    alpha: float | None
    scaling: NestedScaling | None
    transposed: bool
    layouts: Mapping[str, Layout]
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]

    @classmethod
    def recognises(cls, header: Header) -> bool:
        if header.config is not None or LitGPT.recognises(header):
            return False
        return any(key.rpartition(".")[2] in _SLOTS and not _OTHERS.search(key) for key in header.specs)

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
        layouts: dict[str, Layout] = {}
        for target, slots in keys.items():
            if not transposed and len(slots) == 2:
                keys[target], layouts[target] = _of_target(header, target, slots, hints)
        warnings = []
        if transposed and hints.scaling is None:
            warnings.append(
                "a MatryoshkaLoRA file does not state how ranks are scaled: norms are for scale 1; pass --scaling"
            )
        if not transposed and hints.alpha is None:
            warnings.append("the file does not state alpha: norms are for alpha 1; state it with --alpha")
        return cls(keys, hints.alpha, hints.scaling, transposed, layouts, tuple(extras), {}, tuple(warnings))

    def place(self, target: str) -> Placement | None:
        path = whisper.to_transformers(target)
        return lone("bare names", "", target) if path is None else lone(whisper.RULE, "", path)

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
        return self.layouts.get(target, Layout())

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
                # a rank above both sizes is none: those are factors of fused projections
                swapped += a[1] == b[0] and a[0] != b[1] and a[1] <= max(a[0], b[1])
    if plain and swapped:
        raise InputError(f"{header.path}: some factors are stored as (r, n) and some as (n, r); split the file")
    return swapped > 0


def _of_target(header: Header, target: str, slots: dict[str, str], hints: Hints) -> tuple[dict[str, str], Layout]:
    """The slots by the family that they belong to, and the layout: that of fused projections where shapes say so."""
    a, b = header.specs[slots["down"]].shape, header.specs[slots["up"]].shape
    base = hints.base_shape(f"{target}.weight") if hints.base_shape else None
    if len(a) != 2 or len(b) != 2 or not b[1] or a[0] == b[1] or a[0] % b[1]:
        return slots, Layout(transposed=len(a) == len(b) == 2 and b[0] != a[1] and base == (a[1], b[0]))
    updated = a[0] // b[1]
    enabled = hints.enable_lora
    if enabled is not None and len(enabled) == updated:
        enabled = (True,) * updated
    if enabled is None or sum(enabled) != updated or b[0] % updated:
        given = "" if enabled is None else f"; --enable-lora names {sum(enabled)}"
        raise AdapterError(
            f"{header.path}: {target} updates {updated} of some fused projections, and the file does not say "
            f"which{given}; pass --enable-lora with one flag for each projection, such as 1,0,1"
        )
    blocks = tuple((b[0] // updated, on) for on in enabled)
    shape = (sum(size for size, _ in blocks), a[1])
    merged = {"merged_down": slots["down"], "merged_up": slots["up"]}
    return merged, Layout(blocks=blocks, transposed=base == shape[::-1] != shape)
