"""XLabs' FLUX LoRA: the factors lie in the attention processors, and every scale is 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.families.base import Layout
from loratools.formats.base import Declaration, Format, Header, Hints, NestedScaling, ScaleMode, Written
from loratools.formats.modules import Module, Piece, Placement, Rows, lone

if TYPE_CHECKING:
    from typing_extensions import Self

_KEY = re.compile(
    r"^(?P<target>(?:diffusion_model\.)?(?P<kind>double|single)_blocks\.(?P<index>\d+)\.processor\."
    r"(?P<part>qkv_lora[12]?|proj_lora[12]?))\.(?P<side>down|up)\.weight$"
)
_TARGET = re.compile(r"^(?:diffusion_model\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)$")
_QKV = {
    ("double", "1"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("double", "2"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("single", ""): ("attn.to_q", "attn.to_k", "attn.to_v"),  # the first three quarters of linear1 but its MLP
}
_PROJ = {("double", "1"): "attn.to_out.0", ("double", "2"): "attn.to_add_out", ("single", ""): "proj_out"}


@final
@dataclass(frozen=True)
class XLabs(Format):
    """1 is the image stream, 2 the text stream."""

    name: ClassVar[str] = "xlabs"

    keys: Mapping[str, Mapping[str, str]]
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return any(_KEY.match(key) for key in header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        keys: dict[str, dict[str, str]] = {}
        extras = []
        for key in header.specs:
            if (match := _KEY.match(key)) is None:
                extras.append(key)
            else:
                keys.setdefault(match["target"], {})[match["side"]] = key
        warnings = () if hints.alpha is None else ("the alpha given is ignored: this dialect has none, its scale is 1",)
        return cls(keys, tuple(extras), {}, warnings)

    def place(self, target: str) -> Placement | None:
        match = _TARGET.match(target)
        if match is None or (match[1], match[4]) not in _PROJ:
            return None
        which = (match[1], match[4])
        stem = f"{'transformer_blocks' if match[1] == 'double' else 'single_transformer_blocks'}.{match[2]}"
        if match[3] == "proj":
            return lone("XLabs names", "transformer", f"{stem}.{_PROJ[which]}")
        pieces = (
            Piece(Module("transformer", f"{stem}.{name}"), Rows.part(i, (1, 1, 1)))
            for i, name in enumerate(_QKV[which])
        )
        return Placement("XLabs names", tuple(pieces))

    def spell(self, target: str, slot: str) -> str:
        return self.keys[target][slot]

    def layout(self, target: str) -> Layout:
        return Layout()

    def scale_key(self, target: str) -> str | None:
        return None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return 1.0

    def writable_scale(self, target: str, rank: int, scale: float, mode: ScaleMode) -> float:
        return 1.0

    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        return Declaration(None, metadata)

    def parameter(self, target: str) -> str:
        return f"{target}.weight"

    @property
    def nested_scaling(self) -> NestedScaling | None:
        return None

    def is_stored_transposed(self, target: str) -> bool:
        return False

    def without_mutation(self) -> Self:
        return self

    def replacements(self) -> Mapping[str, str]:
        return {}
