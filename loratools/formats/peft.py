"""Hugging Face PEFT: `adapter_config.json` beside weights whose keys start with `base_model.model.`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools.errors import AdapterError, InputError, UnmappedModuleError
from loratools.families.base import Layout
from loratools.formats.base import Declaration, Format, Header, Hints, NestedScaling, Order, Part, ScaleMode, Written
from loratools.formats.kohya_names import clip_path
from loratools.formats.layouts import whisper
from loratools.formats.lora_config import (
    DEFAULT_ALPHA,
    OF_EXTRAS,
    SELECTORS,
    has_latent_mapping,
    pattern_value,
    rank_fields,
    stated_scale,
    still_true,
    target_modules,
)
from loratools.formats.method_configs import KINDRED
from loratools.formats.method_settings import token_settings
from loratools.formats.modules import Module, Piece, Placement, lone
from loratools.formats.torchtune import Torchtune

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Set

    from loratools.storage.base import TensorSpec

PREFIX = "base_model.model."

# An adapter name may follow the parameter in files that trainers dump themselves.
_KEY = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?$"
)
# What stands between a module and its own parameter where that was saved whole.
_INFIX = re.compile(
    r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+(?=\.)|\.ln_tuning_layers(\.(?!weight$|bias$)[^.]+)?(?=\.)"
)
# Rows of an embedding table, beside factors of other targets.
_TOKENS = re.compile(r"^(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?$")
_SLOTS = {
    ("lora_A", "weight"): "down",
    ("lora_B", "weight"): "up",
    ("lora_B", "bias"): "up_bias",
    ("lora_embedding_A", None): "down",
    ("lora_embedding_B", None): "up",
    ("lora_magnitude_vector", None): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
}
_SPELLINGS = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "up_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
_EMBEDDING_SPELLINGS = {
    "down": "lora_embedding_A",
    "up": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector",
}
_HARMLESS = ("lora_monteclora_sampler", "lora_velora_embed", "lora_dropout")
_VARIANTS = ("use_qalora", "use_bdlora", "kasa_config", "arrow_config")
# PEFT adapters of one component of an image model do not say which: its modules' names do.
_COMPONENTS = {
    "unet": re.compile(r"(down_blocks|up_blocks|mid_block)\."),
    "transformer": re.compile(r"(single_)?transformer_blocks\.\d+\.|blocks\.\d+\.(attn[12]|ffn)\."),
    "text_encoder": re.compile(r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$"),
}
# Initialisations that subtract their factors from the base weight.
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Parameters of an expert module in the order in which the models declare them, which is the order of nesting.
_EXPERT_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "down_proj", "w2")


def mutated_base(config: Mapping[str, Any]) -> str | None:
    """The initialisation that made these factors relative to a changed base weight, or None."""
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MUTATING):
        return init
    return "loftq" if config.get("loftq_config") else None


def _names_residual(header: Header, config: Mapping[str, Any]) -> bool:
    """Whether the base model's name or the folder's is as the authors of PiSSA name theirs."""
    named = str(config.get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2]
    return "pissa" in named.lower() or header.path.parent.name == "pissa_init"


@final
@dataclass(frozen=True)
class Peft(Format):
    """PEFT's LoRA and DoRA; `config` None stands for a weights file alone, whose alpha nobody knows."""

    name: ClassVar[str] = "peft"
    holds: ClassVar[frozenset[str]] = frozenset({"lora", "dora"})
    kindred: ClassVar[Mapping[str, str]] = KINDRED
    slots: ClassVar[frozenset[str]] = frozenset({"down", "up", "up_bias", "magnitude"})

    config: Mapping[str, Any] | None
    alpha: float | None  # given by the user where there is no config
    keys: Mapping[str, Mapping[str, str]]
    layouts: Mapping[str, Layout]
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]

    @classmethod
    def recognises(cls, header: Header) -> bool:
        if has_latent_mapping(header.specs):
            return False
        if header.config is not None and "peft_type" in header.config:
            # torchtune writes a config of PEFT's beside weights under its own names too
            return header.config["peft_type"] == "LORA" and not Torchtune.recognises(header)
        return any(
            key.startswith(PREFIX) and (m := _KEY.match(key)) and (m["part"], m["leaf"]) in _SLOTS
            for key in header.specs
        )

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Peft:
        config = header.config
        if config is not None:
            _check_config(header, config)
        groups: dict[str, dict[str, str]] = {}
        embeddings: set[str] = set()
        extras: list[str] = []
        tokens: dict[str, str] = {}
        for key in header.specs:
            if config is not None and (rows := _TOKENS.match(path_of(key))):
                tokens[rows["module"]] = key
                continue
            match = _KEY.match(path_of(key))
            slot = _SLOTS.get((match["part"], match["leaf"])) if match else None
            if match is None or slot is None:
                if re.search(r"\.lora_[A-Za-z]|lora_latent_mapping", key) and not any(h in key for h in _HARMLESS):
                    raise AdapterError(f"{header.path}: {key} belongs to a variant of LoRA that is not supported")
                extras.append(key)
                continue
            module = match["module"]
            if slot in groups.setdefault(module, {}):
                raise AdapterError(
                    f"{header.path}: {module} has two tensors for {slot}: {groups[module][slot]} and {key}"
                )
            groups[module][slot] = key
            if match["part"].startswith("lora_embedding"):
                embeddings.add(module)
        names = _parameter_names(groups, config, header.specs)
        keys = {names[module]: slots for module, slots in groups.items()}
        if config is None and (lost := [m for m in groups if re.search(r"\.experts(\.base_layer)*$", m)]):
            raise AdapterError(
                f"{header.path}: {lost[0]} holds a stack of experts, whose number only adapter_config.json tells; put "
                "it beside the file"
            )
        transposed = bool(config and config.get("fan_in_fan_out"))
        layouts = {}
        for module, slots in groups.items():
            if module in embeddings:
                layouts[names[module]] = Layout(transposed=True, embedding=True)
            elif names[module] != module:
                layouts[names[module]] = Layout(experts=_experts(names[module], slots, config, header.specs))
            else:
                down = header.specs[slots["down"]].shape if "down" in slots else ()
                layouts[module] = Layout(transposed=transposed and len(down) == 2)
        warnings = []
        for module, key in tokens.items():
            if module in keys:
                extras.append(key)
                warnings.append(f"{module} has trained rows beside its factors; they are carried along, not applied")
            else:
                keys[module], layouts[module] = {"token_rows": key}, Layout(transposed=True, embedding=True)
        if config is None and hints.alpha is None:
            warnings.append(
                "no adapter_config.json: alpha is unknown, so norms are for alpha 1; relative figures are right, and "
                "what is written stays right under whatever alpha applies. State it with --alpha"
            )
        if config is not None and "lora_alpha" not in config:
            warnings.append(f"adapter_config.json states no lora_alpha; PEFT assumes {DEFAULT_ALPHA}")
        if config is not None and (init := mutated_base(config)):
            warnings.append(
                f"trained with init_lora_weights={init!r}: these factors are relative to a base weight that the "
                "initialisation changed, not to the original; pass --initial-adapter with the saved initial factors to "
                "make a plain LoRA"
            )
        if config is not None and not mutated_base(config) and _names_residual(header, config):
            warnings.append(
                "its names say that it goes with the residual base of a PiSSA: on the original base the principal part "
                "would be added twice; convert it with --base and --residual-base to make a plain LoRA"
            )
        if config is not None and config.get("alora_invocation_tokens"):
            warnings.append("an activated LoRA: it applies only after its invocation tokens, and must not be merged")
        return cls(config, hints.alpha, keys, layouts, tuple(extras), {}, tuple(warnings))

    @classmethod
    def arrange(cls, modules: Mapping[Module, tuple[int, ...] | None], order: Order) -> Mapping[str, Placement]:
        components = list(dict.fromkeys(m.component for m in modules))
        if len(components) > 1:
            raise UnmappedModuleError(
                f"a PEFT adapter is for one model, and this has {', '.join(components)}; choose one with --component"
            )
        return {m.path: Placement("PEFT names", (Piece(m),)) for m in modules}

    @classmethod
    def lacks(cls, layout: Layout, slots: Set[str]) -> str | None:
        if layout.experts > 1:  # spelt by the order of target_parameters, which a new config would have to keep
            return "a stack of experts"
        return "a magnitude per input" if layout.magnitude_axis == 1 and "magnitude" in slots else None

    def carried_config(self) -> Mapping[str, Any]:
        return self.config or {}

    def kept_config(self, targets: Set[str], *, portable: bool, without_extras: bool) -> Mapping[str, Any]:
        same = targets == set(self.keys)
        return still_true(self.carried_config(), same_targets=same, portable=portable, without_extras=without_extras)

    @classmethod
    def magnitude_shape(cls, part: Part, count: int) -> tuple[int, ...]:
        kernel = 0 if part.shape is None else len(part.shape) - 2
        return (1, count, *(1 for _ in range(kernel))) if kernel > 0 else (count,)

    @classmethod
    def compose(cls, parts: Mapping[str, Part], order: Order) -> Peft:
        """The dialect of a new adapter: `order.config` gives what is not about ranks, `declare` the rest."""
        keys: dict[str, dict[str, str]] = {}
        for target, part in parts.items():
            spellings = _EMBEDDING_SPELLINGS if part.layout.embedding else _SPELLINGS
            keys[target] = {slot: f"{PREFIX}{target}.{spellings[slot]}" for slot in part.slots}
        fields = {
            "peft_type": "LORA",
            "r": 0,
            "lora_alpha": 0,
            "target_modules": target_modules(list(parts)),
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": False,
            "use_dora": any("magnitude" in part.slots for part in parts.values()),
            "lora_bias": any("up_bias" in part.slots for part in parts.values()),
            "fan_in_fan_out": any(p.layout.transposed and not p.layout.embedding for p in parts.values()),
            "bias": "none",
            "modules_to_save": None,
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "init_lora_weights": True,
        }
        layouts = {target: part.layout for target, part in parts.items()}
        return cls(fields | dict(order.config), None, keys, layouts, (), {}, ())

    def place(self, target: str) -> Placement | None:
        return placed(target, self._component)

    @cached_property
    def _component(self) -> str:
        """The component of an image model that the adapter is for, "" for any other model: one for all its targets."""
        return component_of(self.keys)

    def as_lora(self, parts: Mapping[str, Part], extras: tuple[str, ...]) -> Peft:
        plain = Peft.compose(parts, Order())
        assert plain.config is not None
        keys = {
            t: {slot: self.keys.get(t, {}).get(slot, spelt) for slot, spelt in slots.items()}
            for t, slots in plain.keys.items()
        }
        for target, part in parts.items():
            if part.layout.experts > 1 and target not in self.keys:
                raise AdapterError(
                    f"{target}: experts are spelt by the order of target_parameters in a config; name their adapter "
                    "first"
                )
        layouts = {target: part.layout for target, part in parts.items()}
        if self.config is None:
            return Peft(None, self.alpha, keys, layouts, extras, {}, self.warnings)
        restated = {field: plain.config[field] for field in ("use_dora", "lora_bias", "fan_in_fan_out")}
        config = {**self.config, **{f: v for f, v in restated.items() if bool(self.config.get(f)) != v}}
        if config.get("fan_in_fan_out"):
            _check_transposed(parts)
        if set(parts) != set(self.keys):
            config["target_modules"] = target_modules([t for t, p in parts.items() if p.layout.experts == 1])
            config |= {field: None for field in SELECTORS if config.get(field) is not None}
        if not extras:
            config |= {f: None for f in OF_EXTRAS if config.get(f) is not None}
            config["bias"] = "none"
        return Peft(config, None, keys, layouts, extras, {}, self.warnings)

    def spell(self, target: str, slot: str) -> str:
        known = self.keys[target]
        if slot in known:
            return known[slot]
        stem = known["up"].removesuffix(".lora_B.weight")
        return f"{stem}.{_SPELLINGS[slot]}"

    def layout(self, target: str) -> Layout:
        return self.layouts[target]

    def settings(self, target: str) -> Mapping[str, Any]:
        return token_settings(self.config or {}, target) if "token_rows" in self.keys[target] else {}

    def scale_key(self, target: str) -> str | None:
        return None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        if "token_rows" in self.keys[target]:
            return 1.0
        if self.config is None:
            return (1.0 if self.alpha is None else self.alpha) / rank
        return stated_scale(self.config, target, rank)

    def writable_scale(self, target: str, rank: int, scale: float, mode: ScaleMode) -> float:
        if self.config is None:
            return self.scale(target, rank, None)
        return 1.0 if mode == "fold" else scale

    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        if self.config is None:
            return Declaration(None, metadata)
        factored = {target: w for target, w in written.items() if "token_rows" not in self.keys[target]}
        fields = rank_fields(self.config, factored) if factored else {}
        return Declaration({**self.config, **fields} if fields else self.config, metadata)

    def parameter(self, target: str) -> str:
        return target if self.layouts[target].experts > 1 else f"{target}.weight"

    @property
    def nested_scaling(self) -> NestedScaling | None:
        return None

    def is_stored_transposed(self, target: str) -> bool:
        return False

    @property
    def mutated_init(self) -> str | None:
        return None if self.config is None else mutated_base(self.config)

    def without_mutation(self) -> Peft:
        if self.config is None:
            return self
        plain = dict(self.config) | {"init_lora_weights": True}
        plain = {key: value for key, value in plain.items() if key != "loftq_config"}
        return replace(self, config=plain)

    def replacements(self) -> Mapping[str, str]:
        return {key: whole_parameter(key) for key in self.extras if key.endswith((".weight", ".bias"))}


def _check_transposed(parts: Mapping[str, Part]) -> None:
    """`fan_in_fan_out` holds for all matrices of a file or for none."""
    for target, part in parts.items():
        if not part.layout.transposed and part.shape is not None and len(part.shape) == 2:
            raise AdapterError(f"{target}: its base is not transposed, though fan_in_fan_out says so of all others")


def path_of(key: str) -> str:
    """`key` without PEFT's prefix, which a model that was wrapped twice has twice."""
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return key


def component_of(targets: Iterable[str]) -> str:
    """The component of an image model that names of PEFT tell, "" for any other model."""
    names = tuple(targets)
    return next((component for component, begins in _COMPONENTS.items() if any(map(begins.match, names))), "")


def placed(target: str, component: str) -> Placement:
    """Where a target of PEFT lies in its model."""
    if not component and (path := whisper.to_transformers(target)) is not None:
        return lone(whisper.RULE, "", path)
    return lone("PEFT names", component, clip_path(target) if component == "text_encoder" else target)


def whole_parameter(key: str) -> str:
    """The base parameter that a tensor saved whole replaces."""
    return _INFIX.sub("", path_of(key))


def _check_config(header: Header, config: Mapping[str, Any]) -> None:
    if used := [field for field in _VARIANTS if config.get(field)]:
        raise AdapterError(f"{header.path}: the LoRA variant {used[0]} is not supported")
    for pattern in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(pattern) or {}, dict):
            raise InputError(f"{header.path}: {pattern} in adapter_config.json is not an object")


def _parameter_names(
    groups: Iterable[str], config: Mapping[str, Any] | None, specs: Mapping[str, TensorSpec]
) -> dict[str, str]:
    """Module path in the file -> target; adapters on bare parameters nest, the last declared parameter outermost."""
    listed = list((config or {}).get("target_parameters") or [])
    names: dict[str, str] = {}
    nested: dict[str, list[str]] = {}
    for path in groups:
        module = re.sub(r"(\.base_layer)+$", "", path)
        leaves = [p.rpartition(".")[2] for p in listed if f".{module}".endswith(f".{p.rpartition('.')[0]}")]
        if leaves:
            nested.setdefault(module, []).append(path)
        names[path] = path
    for module, paths in nested.items():
        leaves = [p.rpartition(".")[2] for p in listed if f".{module}".endswith(f".{p.rpartition('.')[0]}")]
        if len(paths) != len(leaves):
            raise AdapterError(
                f"{module} carries {len(paths)} adapters for {len(leaves)} target_parameters: {', '.join(leaves)}"
            )
        order = sorted(
            leaves, key=lambda leaf: (_EXPERT_ORDER.index(leaf) if leaf in _EXPERT_ORDER else len(_EXPERT_ORDER), leaf)
        )
        for path, leaf in zip(sorted(paths, key=len, reverse=True), order, strict=True):
            names[path] = f"{module}.{leaf}"
    return names


def _experts(
    target: str, slots: Mapping[str, str], config: Mapping[str, Any] | None, specs: Mapping[str, TensorSpec]
) -> int:
    rank = pattern_value((config or {}).get("rank_pattern") or {}, target, (config or {}).get("r"))
    rows = specs[slots["down"]].shape[0] if "down" in slots else 0
    if not isinstance(rank, int) or rank < 1 or rows % rank:
        raise AdapterError(
            f"{target}: {rows} rows of lora_A are no multiple of the rank {rank!r} in adapter_config.json"
        )
    return rows // rank
