"""AdapterHub: adapter_config.json with `config` and `model_class`; LoRA and (IA)^3 under `<module>.loras.<name>`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools.errors import AdapterError, naming
from loratools.families.base import Layout
from loratools.formats.base import Header, Hints
from loratools.formats.bottlenecks import adapterhub, is_hub_bottleneck, with_reduction
from loratools.formats.modules import Placement, lone
from loratools.formats.read_only import UNKNOWN_ALPHA, ReadOnly, number

if TYPE_CHECKING:
    from typing_extensions import Self

_LORA = re.compile(r"^(?P<target>.+)\.loras\.(?P<name>[^.]+)\.(?P<rest>.+)$")
# What is no update of a weight, by what its keys hold.
NOT_WEIGHTS: Mapping[str, str] = {
    "adapters": "a bottleneck adapter",
    "attention_adapters": "a bottleneck adapter",
    "invertible_adapters": "an invertible adapter of the embeddings",
    "prefix_tunings": "a prefix tuning: trained keys and values",
    "reft_layer": "ReFT: an intervention on hidden states",
    "refts": "ReFT: an intervention on hidden states",
    "shared_parameters": "parameters that bottleneck adapters share",
}
_OTHER = re.compile(rf"\.({'|'.join(NOT_WEIGHTS)})\.")
_FUSED = ("c_attn", "query_key_value", "in_proj")
_ORDER = ("q", "k", "v")
# What stands before a module's name in a model with a head, which the files leave out.
_STEMS = {"gpt2": "transformer", "gptj": "transformer", "gpt_neox": "gpt_neox", "llama": "model", "mistral": "model"}
_OWN_NAME = ("bert", "roberta", "distilbert", "electra", "albert", "deberta", "vit", "beit")


@final
@dataclass(frozen=True)
class AdapterHub(ReadOnly):
    """Adapters of the `adapters` library; scale alpha / r for LoRA, composition_mode `scale` is (IA)^3.

    Houlsby's and Pfeiffer's bottlenecks are no updates of weights: they are described, pruned and carried along.
    """

    name: ClassVar[str] = "adapterhub"
    weights_name: ClassVar[str] = "adapter.safetensors"

    @classmethod
    def recognises(cls, header: Header) -> bool:
        config = header.config or {}
        if "peft_type" in config:
            return False
        inner = isinstance(config.get("config"), Mapping) and bool({"model_class", "model_type"} & set(config))
        known = any(_LORA.match(key) or ".prefix_tunings." in key for key in header.specs)
        return inner or known or any(map(is_hub_bottleneck, header.specs))

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        inner = (header.config or {}).get("config")
        fields: Mapping[str, Any] = inner if isinstance(inner, Mapping) else {}
        keys: dict[str, dict[str, str]] = {}
        extras: list[str] = []
        unsupported: dict[str, str] = {}
        gated = {m["target"] for key in header.specs if (m := _LORA.match(key)) and m["rest"].startswith("gate.")}
        for key in header.specs:
            match = _LORA.match(key)
            if match is None or match["target"] in gated:
                extras.append(key)
                other = _OTHER.search(f".{key}")
                what = "gated" if match else NOT_WEIGHTS.get(other[1]) if other else None
                if what is not None:
                    unsupported[key] = f"{what}, which is not an update of a weight"
                continue
            if match["rest"] not in ("lora_A", "lora_B") or fields.get("use_dora"):
                raise AdapterError(f"{header.path}: {key} belongs to a variant of LoRA that is not supported")
            slot = {"lora_A": "down", "lora_B": "up"}[match["rest"]]
            if slot in keys.setdefault(match["target"], {}):
                raise AdapterError(f"{header.path}: {match['target']} has two adapters; save them apart")
            keys[match["target"]][slot] = key
        with naming(str(header.path)):
            places = adapterhub(header.specs, header.config)
        layouts: dict[str, Layout] = {}
        for target, slots in keys.items():
            keys[target], layouts[target] = _of_target(header, target, slots, fields, hints)
        alpha = number(fields, "alpha", "adapter_config.json")
        scales_weights = fields.get("composition_mode") == "scale"
        if scales_weights and alpha not in (None, 1.0):
            raise AdapterError(f"{header.path}: (IA)^3 with an alpha of {alpha:g} is not supported; train it with 1")
        warnings = []
        if alpha is None and keys and not scales_weights:
            alpha = hints.alpha
            warnings += [f"no alpha in adapter_config.json: {UNKNOWN_ALPHA}"] if alpha is None else []
        return cls(header.config, alpha, keys, layouts, tuple(extras), unsupported, tuple(warnings), bottlenecks=places)

    def place(self, target: str) -> Placement | None:
        return lone("AdapterHub names", "", f"{self._stem}{target}")

    def config_with(self, widths: Mapping[str, int]) -> Mapping[str, Any] | None:
        return None if self.config is None else with_reduction(self.config, self.bottlenecks, widths)

    @property
    def _stem(self) -> str:
        kind, of = str((self.config or {}).get("model_type")), str((self.config or {}).get("model_class"))
        if of.endswith("Model") and not of.endswith(("AdapterModel", "LMHeadModel")):
            return ""
        stem = _STEMS.get(kind) or (kind if kind in _OWN_NAME else "")
        return f"{stem}." if stem else ""


def _of_target(
    header: Header, target: str, slots: dict[str, str], fields: Mapping[str, Any], hints: Hints
) -> tuple[dict[str, str], Layout]:
    """The slots by the family that they belong to, and the layout."""
    conv1d = (header.config or {}).get("model_type") == "gpt2"
    if fields.get("composition_mode") == "scale":
        if set(slots) != {"up"}:
            raise AdapterError(f"{header.path}: {target} has a lora_A, which (IA)^3 has not")
        return {"ia3_l": slots["up"]}, Layout(transposed=conv1d)
    if target.rpartition(".")[2] not in _FUSED or set(slots) != {"down", "up"}:
        return slots, Layout(transposed=conv1d)
    a, b = header.specs[slots["down"]].shape, header.specs[slots["up"]].shape
    wanted = fields.get("attn_matrices") or ["q", "v"]
    enabled = tuple(part in wanted for part in _ORDER)
    count = sum(enabled)
    if len(a) != 2 or len(b) != 2 or not count or b[0] % count:
        raise AdapterError(f"{header.path}: {target}: up {b} and down {a} do not hold {count} projections")
    blocks = tuple((b[0] // count, on) for on in enabled)
    merged = {"merged_down": slots["down"], "merged_up": slots["up"]}
    return merged, Layout(transposed=conv1d, blocks=blocks)
