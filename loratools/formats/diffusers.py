"""diffusers: `pytorch_lora_weights.safetensors`, one prefix a component, in the three spellings that it has had."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools.errors import InputError, UnmappedModuleError
from loratools.families.base import Layout
from loratools.formats.base import Declaration, Format, Header, Hints, NestedScaling, Order, Part, ScaleMode, Written
from loratools.formats.kohya import stored_alpha
from loratools.formats.kohya_names import clip_path
from loratools.formats.lora_config import rank_fields, stated_scale, target_modules
from loratools.formats.modules import Module, Piece, Placement, lone

if TYPE_CHECKING:
    from typing_extensions import Self

METADATA = "lora_adapter_metadata"
_COMPONENT = re.compile(r"^(unet|transformer(?:_2)?|text_encoder(?:_[23])?|prior)\.(.+)$")
_SLOTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "dora_scale": "magnitude",
}
_SPELLINGS = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "up_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
_SUFFIX = re.compile(rf"\.({'|'.join(re.escape(s) for s in _SLOTS)})$")
# The oldest spelling: the attention's processor holds the factors of its projections.
_PROCESSOR = re.compile(r"^(.+)\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_ALPHA = ".alpha"


@final
@dataclass(frozen=True)
class Diffusers(Format):
    """LoRA and DoRA of the components of a pipeline; without metadata, every scale is 1."""

    name: ClassVar[str] = "diffusers"
    holds: ClassVar[frozenset[str]] = frozenset({"lora", "dora"})
    slots: ClassVar[frozenset[str]] = frozenset({"down", "up", "up_bias", "magnitude"})

    configs: Mapping[str, Mapping[str, Any]] | None  # component -> LoraConfig; None for a file without metadata
    keys: Mapping[str, Mapping[str, str]]
    alphas: frozenset[str]
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]

    @classmethod
    def recognises(cls, header: Header) -> bool:
        if header.config is not None or any(key.endswith(".lora_down.weight") for key in header.specs):
            return False  # the latter are OMI's, under the same prefixes
        return any(_COMPONENT.match(key) and _parse(key) for key in header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        keys: dict[str, dict[str, str]] = {}
        extras = []
        for key in header.specs:
            found = _parse(key) if _COMPONENT.match(key) else None
            if found is None:
                extras.append(key)
                continue
            target, slot = found
            if slot in keys.setdefault(target, {}):
                raise InputError(f"{header.path}: {target} has two tensors for {slot}: {keys[target][slot]} and {key}")
            keys[target][slot] = key
        alphas = frozenset(key.removesuffix(_ALPHA) for key in extras if key.removesuffix(_ALPHA) in keys)
        extras = [key for key in extras if key.removesuffix(_ALPHA) not in alphas]
        warnings = []
        configs = _configs(header)
        if configs is None and hints.alpha is not None:
            warnings.append("the alpha given is ignored: without metadata, diffusers takes alpha = rank")
        return cls(configs, keys, alphas, tuple(extras), {}, tuple(warnings))

    @classmethod
    def arrange(cls, modules: Mapping[Module, tuple[int, ...] | None], order: Order) -> Mapping[str, Placement]:
        if lost := [m for m in modules if not m.component]:
            raise UnmappedModuleError(f"{lost[0]}: which component of a pipeline it belongs to is not known")
        return {str(m): Placement("diffusers names", (Piece(m),)) for m in modules}

    @classmethod
    def lacks(cls, layout: Layout, slots: Set[str]) -> str | None:
        if layout.magnitude_axis == 1 and "magnitude" in slots:
            return "a magnitude per input"
        return Format.lacks(layout, slots)

    def carried_config(self) -> Mapping[str, Any]:
        return self.configs or {}

    @classmethod
    def magnitude_shape(cls, part: Part, count: int) -> tuple[int, ...]:
        kernel = 0 if part.shape is None else len(part.shape) - 2
        return (1, count, *(1 for _ in range(kernel))) if kernel > 0 else (count,)

    @classmethod
    def compose(cls, parts: Mapping[str, Part], order: Order) -> Self:
        configs: dict[str, dict[str, Any]] | None = None
        keys = {target: {slot: f"{target}.{_SPELLINGS[slot]}" for slot in part.slots} for target, part in parts.items()}
        if order.metadata:
            configs = {}
            for component in dict.fromkeys(_split(target)[0] for target in parts):
                here = {_split(t)[1]: part for t, part in parts.items() if _split(t)[0] == component}
                configs[component] = {
                    "r": 0,
                    "lora_alpha": 0,
                    "target_modules": target_modules(list(here)),
                    "rank_pattern": {},
                    "alpha_pattern": {},
                    "use_rslora": False,
                    "use_dora": any("magnitude" in part.slots for part in here.values()),
                    "lora_bias": any("up_bias" in part.slots for part in here.values()),
                    "bias": "none",
                    **(order.config.get(component) or {}),
                }
        return cls(configs, keys, frozenset(), (), {}, ())

    def place(self, target: str) -> Placement | None:
        component, path = _split(target)
        return lone("diffusers names", component, clip_path(path) if component.startswith("text_encoder") else path)

    def spell(self, target: str, slot: str) -> str:
        return self.keys[target].get(slot) or f"{target}.{_SPELLINGS[slot]}"

    def layout(self, target: str) -> Layout:
        return Layout()

    def scale_key(self, target: str) -> str | None:
        return f"{target}{_ALPHA}" if target in self.alphas else None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        if stored_alpha is not None:
            return stored_alpha / rank
        component, path = _split(target)
        config = (self.configs or {}).get(component)
        if config is None:
            return 1.0
        return stated_scale({"lora_alpha": rank, **config}, path, rank)

    def writable_scale(self, target: str, rank: int, scale: float, mode: ScaleMode) -> float:
        stated = target in self.alphas or (self.configs or {}).get(_split(target)[0]) is not None
        return scale if mode == "keep" and stated else 1.0

    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        scalars = {}
        for target in written:
            if target in self.alphas:
                scalars[f"{target}{_ALPHA}"] = stored_alpha(written[target].scale * written[target].rank)
        if self.configs is None:
            return Declaration(None, metadata, scalars)
        flat: dict[str, Any] = {}
        changed = False
        for component, config in self.configs.items():
            here = {_split(t)[1]: w for t, w in written.items() if _split(t)[0] == component and t not in self.alphas}
            fields = rank_fields(config, here) if here else {}
            changed = changed or bool(fields)
            flat |= {f"{component}.{field}": value for field, value in {**config, **fields}.items()}
        if not changed and METADATA in metadata:
            return Declaration(None, metadata, scalars)
        text = json.dumps(flat, indent=2, sort_keys=True)
        return Declaration(None, {**metadata, METADATA: text}, scalars)

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
        return {key: key for key in self.extras if _COMPONENT.match(key) and key.endswith((".weight", ".bias"))}


def _parse(key: str) -> tuple[str, str] | None:
    """(target, slot) of a key, None where it is no factor."""
    if (old := _PROCESSOR.match(key)) is not None:
        leaf = "to_out.0" if old[2] == "out" else f"to_{old[2]}"
        return f"{old[1]}.{leaf}", old[3]
    suffix = _SUFFIX.search(key)
    return None if suffix is None else (key[: suffix.start()], _SLOTS[suffix[1]])


def _split(target: str) -> tuple[str, str]:
    component, _, path = target.partition(".")
    return component, path


def _configs(header: Header) -> dict[str, dict[str, Any]] | None:
    text = header.metadata.get(METADATA)
    if text is None:
        return None
    try:
        flat = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{header.path}: {METADATA} in the metadata is not JSON: {error}") from error
    if not isinstance(flat, dict):
        raise InputError(f"{header.path}: {METADATA} in the metadata is not an object")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, field = key.partition(".")
        configs.setdefault(component, {})[field] = value
    for component, config in configs.items():
        for pattern in ("rank_pattern", "alpha_pattern"):
            if not isinstance(config.get(pattern) or {}, dict):
                raise InputError(f"{header.path}: {component}.{pattern} in {METADATA} is not an object")
    return configs
