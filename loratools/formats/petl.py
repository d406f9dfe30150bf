"""PETL-ViT (`binary_adapter`): Bi-LoRA on the queries and values of a ViT, and Bi-AdaptFormer, which is no weight."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import naming
from loratools.formats.base import Header, Hints
from loratools.formats.bottlenecks import petl
from loratools.formats.modules import Placement, lone
from loratools.formats.read_only import ReadOnly

if TYPE_CHECKING:
    from typing_extensions import Self

_LORA = re.compile(r"^(?P<target>blocks\.\d+\.attn\.lora_[qv])\.adapter_(?P<part>down|up)\.weight$")
_BOTTLENECK = re.compile(r"^blocks\.\d+\.adapter_mlp\.adapter_(down|up)\.weight$")
_BLOCK = re.compile(r"^blocks\.(\d+)\.attn\.lora_([qv])$")
_MODULES = {"q": "q_proj", "v": "v_proj"}
_PARAMETERS = {"q": "query", "v": "value"}


@final
@dataclass(frozen=True)
class PetlVit(ReadOnly):
    """The scale is that of the YAML, of up @ down itself; the head is carried along.

    A file tells nothing of itself: its YAML lies beside it under the same name, or in configs/ as the authors have it.
    A target is the query or the value part of timm's fused qkv. Its base parameter goes by the name in the hub's
    checkpoints, its module by that of transformers 5.
    """

    name: ClassVar[str] = "petl-vit"

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return any(_LORA.match(key) or _BOTTLENECK.match(key) for key in header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        keys: dict[str, dict[str, str]] = {}
        extras = []
        unsupported = {}
        for key in header.specs:
            if (match := _LORA.match(key)) is not None:
                keys.setdefault(match["target"], {})[match["part"]] = key
                continue
            extras.append(key)
            if _BOTTLENECK.match(key):
                unsupported[key] = "a bottleneck adapter with a ReLU, which is not an update of a weight"
        stated = header.metadata.get("scale")
        warnings = ["no scale is stated, so norms are for scale 1; its YAML has it"] if keys and stated is None else []
        scale = 1.0 if stated is None else float(stated)
        with naming(str(header.path)):
            places = petl(header.specs, None if stated is None else scale)
        return cls(None, scale, keys, {}, tuple(extras), unsupported, tuple(warnings), bottlenecks=places)

    def place(self, target: str) -> Placement | None:
        layer, part = self._place(target)
        return lone("PETL-ViT names", "", f"vit.layers.{layer}.attention.{_MODULES[part]}")

    def parameter(self, target: str) -> str:
        layer, part = self._place(target)
        return f"vit.encoder.layer.{layer}.attention.attention.{_PARAMETERS[part]}.weight"

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return 1.0 if self.alpha is None else self.alpha

    def _place(self, target: str) -> tuple[str, str]:
        match = _BLOCK.match(target)
        assert match is not None  # `bind` took it from such a key
        return match[1], match[2]
