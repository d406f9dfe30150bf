"""MoSL, the mixture of sparse experts of MoSA's authors that is a LoRA once its experts are merged."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.formats.base import Header, Hints
from loratools.formats.modules import Placement, lone
from loratools.formats.read_only import ReadOnly

if TYPE_CHECKING:
    from typing_extensions import Self

_LORA = re.compile(r"^(?P<attention>.*\battn)\.lora_(?P<side>[AB])_(?P<part>[qkvo])(?P<rest>_merge|\.\d+|)\.weight$")
_SLOTS = {"A": "down", "B": "up"}
_MODULES = {"q": "query", "k": "key", "v": "value", "o": "out"}


@final
@dataclass(frozen=True)
class Mosa(ReadOnly):
    """`attn.lora_{A,B}_{q,k,v,o}`: `.K.weight` of each expert, `_merge.weight` of all, as the model runs, or `.weight`
    of a side that the experts share. The scale is SCALAR of the config, times up @ down itself.

    Experts are carried along, and so is the rest of the model; `loratools.assemble` merges them by another rule.
    """

    name: ClassVar[str] = "mosa"

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return any((m := _LORA.match(key)) and m["rest"] for key in header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        found: dict[str, dict[str, str]] = {}
        unsupported: dict[str, str] = {}
        for key in header.specs:
            if (match := _LORA.match(key)) is None:
                continue
            if match["part"] == "o":
                unsupported[key] = "its branch of `out` reads the layer's input, so that it is not an update of `out`"
            elif match["rest"] in ("", "_merge"):
                target = f"{match['attention']}.{_MODULES[match['part']]}"
                found.setdefault(target, {})[_SLOTS[match["side"]]] = key
        keys = {target: slots for target, slots in found.items() if len(slots) == len(_SLOTS)}
        used = {key for slots in keys.values() for key in slots.values()}
        for slots in found.values():
            for key in slots.values():
                if key not in used:
                    unsupported[key] = "its other side is not merged; merge the experts with loratools.assemble"
        extras = tuple(key for key in header.specs if key not in used)
        if not keys and not unsupported:
            experts = (key for key in extras if _LORA.match(key))
            unsupported = dict.fromkeys(experts, "an expert, not merged; merge them with loratools.assemble")
        warnings = () if hints.alpha is not None or not keys else (_UNKNOWN_SCALE,)
        return cls(None, hints.alpha, keys, {}, extras, unsupported, warnings)

    def place(self, target: str) -> Placement | None:
        return lone("MoSA's names", "", target)

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return 1.0 if self.alpha is None else self.alpha


def is_lora(key: str) -> bool:
    """Whether the key is of a LoRA, of an expert or merged."""
    return _LORA.match(key) is not None


_UNKNOWN_SCALE = "no scale is stated, so norms are for scale 1; SCALAR of its config is one: state it with --alpha"
