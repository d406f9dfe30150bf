"""torchtune: `layers.N.attn.q_proj.lora_a.weight` in a pickle, with the heads' rows interleaved as Meta has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools.errors import UnmappedModuleError
from loratools.families.base import Layout
from loratools.formats.base import Header, Hints
from loratools.formats.modules import Module, Piece, Placement, Rows, lone
from loratools.formats.read_only import UNKNOWN_ALPHA, ReadOnly, number

if TYPE_CHECKING:
    from typing_extensions import Self

_KEY = re.compile(
    r"^(?P<target>layers\.\d+\.(?:attn\.(?:q_proj|k_proj|v_proj|output_proj)|mlp\.w[123])|tok_embeddings|output)\."
    r"(?P<part>lora_a\.weight|lora_b\.weight|magnitude)$"
)
_SLOTS = {"lora_a.weight": "down", "lora_b.weight": "up", "magnitude": "magnitude"}
_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
# Whether torchtune interleaves the rows of the queries' and keys' heads, by the model type of transformers.
_INTERLEAVED = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "qwen3": False}


@final
@dataclass(frozen=True)
class Torchtune(ReadOnly):
    """Scale alpha / r, from the adapter_config.json that torchtune writes beside it; `model` is the base's config.

    The safetensors file that torchtune writes as well is PEFT's, and read as such.
    """

    name: ClassVar[str] = "torchtune"

    model: Mapping[str, Any] = field(default_factory=dict)

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
                keys.setdefault(match["target"], {})[_SLOTS[match["part"]]] = key
        alpha = number(header.config or {}, "lora_alpha", "adapter_config.json")
        warnings = []
        if alpha is None:
            alpha = hints.alpha
            warnings += [f"no lora_alpha in an adapter_config.json: {UNKNOWN_ALPHA}"] if alpha is None else []
        model = header.beside("config.json") or hints.base_config or {}
        embedding = Layout(transposed=True, embedding=True)
        layouts = {target: embedding for target in keys if target == "tok_embeddings"}
        return cls(header.config, alpha, keys, layouts, tuple(extras), {}, tuple(warnings), model)

    def place(self, target: str) -> Placement | None:
        rule = "torchtune names"
        if target in ("tok_embeddings", "output"):
            return lone(rule, "", "model.embed_tokens" if target == "tok_embeddings" else "lm_head")
        _, layer, path = target.split(".", 2)
        name = f"model.layers.{layer}.{_NAMES[path]}"
        if path not in ("attn.q_proj", "attn.k_proj") or not self._interleaved(target):
            return lone(rule, "", name)
        return Placement(rule, (Piece(Module("", name), Rows(heads=self._heads(target))),))

    def _interleaved(self, target: str) -> bool:
        kind = str(self.model.get("model_type"))
        if kind not in _INTERLEAVED:
            raise UnmappedModuleError(
                f"{target}: how torchtune orders its rows depends on the model, and on its number of heads; "
                "put the model's config.json beside the adapter, or pass --base with the model's folder"
            )
        return _INTERLEAVED[kind]

    def _heads(self, target: str) -> int:
        heads = number(self.model, "num_attention_heads", "config.json")
        if target.endswith("k_proj"):
            heads = number(self.model, "num_key_value_heads", "config.json") or heads
        if not heads or heads < 1:
            raise UnmappedModuleError(f"{target}: config.json states no number of attention heads")
        return int(heads)
