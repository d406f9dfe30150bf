"""OMI, a draft that OneTrainer wrote: a component, the authors' names, then `lora_down`, `lora_up` and `alpha`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.families.base import Layout
from loratools.formats.base import Header, Hints
from loratools.formats.kohya import is_per_input
from loratools.formats.kohya_names import clip_path
from loratools.formats.layouts import from_native
from loratools.formats.modules import Module, Piece, Placement, lone
from loratools.formats.read_only import ReadOnly
from loratools.formats.suffixes import ALPHA, SLOTS

if TYPE_CHECKING:
    from typing_extensions import Self

_COMPONENTS = {
    "transformer": "transformer",
    "unet": "unet",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
}
_KEY = re.compile(
    rf"^(?P<target>(?:{'|'.join(_COMPONENTS)}|t5)\..+?)\.(?P<suffix>{'|'.join(map(re.escape, (*SLOTS, ALPHA)))})$"
)
# Parts of a fused projection that have factors of their own: `qkv.0`, `linear1.3`.
_PART = re.compile(r"^(.+\.(?:qkv|linear1))\.([0-3])$")


@final
@dataclass(frozen=True)
class Omi(ReadOnly):
    """alpha missing or zero means alpha = rank; parts of a fused projection are numbered, as in `qkv.1`."""

    name: ClassVar[str] = "omi"

    alphas: frozenset[str] = frozenset()

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return any(key.endswith(".lora_down.weight") and _KEY.match(key) for key in header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        keys: dict[str, dict[str, str]] = {}
        alphas = set()
        extras = []
        for key in header.specs:
            if (match := _KEY.match(key)) is None:
                extras.append(key)
            elif match["suffix"] == ALPHA:
                alphas.add(match["target"])
            else:
                keys.setdefault(match["target"], {})[SLOTS[match["suffix"]]] = key
        orphans = sorted(alphas - set(keys))
        extras += [f"{target}.{ALPHA}" for target in orphans]
        warnings = [f"{target}: an alpha without factors, carried over unchanged" for target in orphans]
        if hints.alpha is not None:
            warnings.append("the alpha given is ignored: this dialect states one for each module")
        layouts = {
            target: Layout(magnitude_axis=1)
            for target, slots in keys.items()
            if "magnitude" in slots and is_per_input(header, slots)
        }
        stated = frozenset(alphas & set(keys))
        return cls(None, None, keys, layouts, tuple(extras), {}, tuple(warnings), stated)

    def scale_key(self, target: str) -> str | None:
        return f"{target}.{ALPHA}" if target in self.alphas else None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return stored_alpha / rank if stored_alpha and rank else 1.0

    def parameter(self, target: str) -> str:
        part = _PART.match(target)
        return f"{target.partition('.')[2] if part is None else part[1].partition('.')[2]}.weight"

    def place(self, target: str) -> Placement | None:
        prefix, _, path = target.partition(".")
        if prefix == "t5":
            has_second = any(t.startswith("clip_g.") for t in self.keys)
            return lone("OMI names", "text_encoder_3" if has_second else "text_encoder_2", path)
        component = _COMPONENTS[prefix]
        if prefix.startswith("clip"):
            return lone("OMI names", component, clip_path(path))
        part = _PART.match(path)
        native = from_native(path if part is None else part[1])
        if native is None:
            return lone("OMI names", component, path)
        rule, parts = native
        if part is not None:
            index = int(part[2])
            return lone(rule, component, parts[index][0]) if index < len(parts) else None
        return Placement(rule, tuple(Piece(Module(component, name), rows) for name, rows in parts))
