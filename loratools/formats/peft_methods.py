"""PEFT's other weight-space methods: `adapter_config.json` names one, and a table says how each lies on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools.errors import AdapterError, InputError
from loratools.families.base import Layout
from loratools.formats.base import Declaration, Format, Header, Hints, NestedScaling, Order, Part, ScaleMode, Written
from loratools.formats.lora_config import pattern_value, still_true
from loratools.formats.method_configs import WRITABLE, config_for, counts_stated
from loratools.formats.method_settings import (
    adalora_scale,
    fourier_settings,
    gralora_scale,
    hra_settings,
    ia3_settings,
    miss_settings,
    number,
    oft_settings,
    paca_scale,
    randlora_scale,
    randlora_settings,
    road_settings,
    tinylora_group,
    tinylora_seed,
    token_settings,
    vblora_settings,
    vera_settings,
    wavelet_settings,
)
from loratools.formats.module_order import in_model_order, is_known_order
from loratools.formats.peft import PREFIX, Peft, component_of, placed, whole_parameter

if TYPE_CHECKING:
    from typing_extensions import Self

    from loratools.formats.modules import Module, Placement

Config = Mapping[str, Any]
SHARED_PREFIX = "base_model."
# Config fields that mean the same for every method.
_SHARED_FIELDS = ("base_model_name_or_path", "revision", "task_type", "modules_to_save", "auto_mapping")


def _unit(config: Config, target: str) -> float:
    return 1.0


def _alpha_over_rank(config: Config, target: str) -> float:
    """The config's alpha and rank, or those of the patterns that match; defaults as in PEFT."""
    rank = pattern_value(config.get("rank_pattern") or {}, target, config.get("r", 8))
    alpha = pattern_value(config.get("alpha_pattern") or {}, target, config.get("alpha", 8))
    return float(alpha) / rank


def _fourier_scaling(config: Config, target: str) -> float:
    return number(config, "scaling", 150.0)


def _wavelet_scaling(config: Config, target: str) -> float:
    return number(config, "scaling", 25.0)


def _nothing(config: Config, target: str) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Method:
    """How the targets of one `peft_type` lie on disk.

    `slots`: what follows the module path -> slot, without `.weight`. `shared`: what follows `base_model.` in the keys
    of tensors that all targets share -> slot. `numbered`: whether each target has a seed and shares a vector by its
    place among the model's modules. `indispensable`: what to do where the file names no target at all.
    """

    slots: Mapping[str, str]
    shared: Mapping[str, str] = field(default_factory=dict)
    scale: Callable[[Config, str], float] = _unit
    settings: Callable[[Config, str], Mapping[str, Any]] = _nothing
    numbered: bool = False
    indispensable: str = ""


def _named(*slots: str) -> dict[str, str]:
    return {slot: slot for slot in slots}


METHODS: Mapping[str, Method] = {
    "LOHA": Method(
        _named("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), scale=_alpha_over_rank
    ),
    # Unlike LyCORIS, PEFT scales by alpha / r even where both factors are whole.
    "LOKR": Method(
        _named("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b") | {"lokr_t2": "lokr_t2"},
        scale=_alpha_over_rank,
    ),
    "ADALORA": Method({"lora_A": "down", "lora_B": "up", "lora_E": "singular"}, scale=adalora_scale),
    "VERA": Method(_named("vera_lambda_b", "vera_lambda_d"), shared=_named("vera_A", "vera_B"), settings=vera_settings),
    "PVERA": Method(
        _named("pvera_lambda_b", "pvera_lambda_d"), shared=_named("pvera_A", "pvera_B"), settings=vera_settings
    ),
    "IA3": Method(_named("ia3_l"), settings=ia3_settings),
    "OFT": Method(_named("oft_R", "oft_embedding_R"), settings=oft_settings),
    "BOFT": Method(_named("boft_R", "boft_s")),
    "HRA": Method(_named("hra_u"), settings=hra_settings),
    "C3A": Method(_named("c3a_kernel")),
    "DELORA": Method(_named("delora_A", "delora_B", "delora_lambda", "delora_w_norm")),
    "FOURIERFT": Method(_named("fourierft_spectrum"), scale=_fourier_scaling, settings=fourier_settings),
    "GRALORA": Method(_named("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"), scale=gralora_scale),
    "HIRA": Method(_named("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")),
    "MISS": Method(_named("miss_block"), settings=miss_settings),
    # of the authors' fork, whose config says so; PEFT itself has none
    "PACA": Method(_named("paca_w", "paca_indices"), scale=paca_scale),
    "RANDLORA": Method(
        _named("randlora_lambda", "randlora_gamma"),
        shared=_named("randlora_A", "randlora_B"),
        scale=randlora_scale,
        settings=randlora_settings,
    ),
    "ROAD": Method(_named("road_theta", "road_alpha"), settings=road_settings),
    "SHIRA": Method(_named("shira_weight", "shira_indices")),
    "TINYLORA": Method(_named("tinylora_A", "tinylora_B", "tinylora_P"), numbered=True),
    "UNILORA": Method(
        _named("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B"),
        shared=_named("unilora_theta_d"),
        indispensable="its indices were not saved, and depend on all modules of the model; load it with PEFT, set "
        "save_indices in its config and save it again",
    ),
    "VBLORA": Method(
        _named(
            "vblora_logits_A",
            "vblora_logits_B",
            *(f"vblora_logits_{side}_topk_{part}" for side in "AB" for part in ("indices", "weights")),
        ),
        shared=_named("vblora_vector_bank"),
        settings=vblora_settings,
    ),
    "WAVEFT": Method(_named("waveft_spectrum"), scale=_wavelet_scaling, settings=wavelet_settings),
    "LN_TUNING": Method({}),  # whole norm layers, which replace those of the base
    "TRAINABLE_TOKENS": Method({"trainable_tokens_delta": "token_rows"}, settings=token_settings),
}

_OF_TABLES = frozenset({"oft_embedding_R", "hira_embedding_A", "token_rows"})  # slots of embedding tables

_OF_EITHER_ORIENTATION = frozenset({"fourierft_spectrum", "waveft_spectrum"})  # slots that `fan_in_fan_out` transposes

# What is no update of a weight: named for what it is, shown by `info`, and left alone.
NOT_WEIGHTS: Mapping[str, str] = {
    "PROMPT_TUNING": "a prompt of trained embeddings",
    "MULTITASK_PROMPT_TUNING": "a prompt of trained embeddings",
    "P_TUNING": "a prompt made by an encoder",
    "PREFIX_TUNING": "trained keys and values",
    "CPT": "a prompt of trained embeddings",
    "CARTRIDGE": "trained keys and values",
    "ADAPTION_PROMPT": "prompts inside the attention layers",
    "XLORA": "a router over several adapters",
    "POLY": "a router over several adapters",
    "LILY": "a router over shared factors, which depends on the input",
    "SHADOW": "a side network",
}


@final
@dataclass(frozen=True)
class PeftMethod(Format):
    """A PEFT adapter of a method other than LoRA; its config is carried over as it is."""

    name: ClassVar[str] = "peft"
    holds: ClassVar[frozenset[str]] = frozenset(WRITABLE)

    config: Mapping[str, Any]
    method: Method
    keys: Mapping[str, Mapping[str, str]]
    shared: Mapping[str, str]  # slot -> key
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]
    largest: tuple[int, int] | None = None  # (outputs, inputs) over all targets, where the base was given and counts

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return header.config is not None and _kind(header.config) in {*METHODS, *NOT_WEIGHTS}

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        assert header.config is not None
        kind = _kind(header.config)
        if kind in NOT_WEIGHTS:
            reason = f"{kind} is {NOT_WEIGHTS[kind]}, not an update of a weight"
            return cls(header.config, Method({}), {}, {}, tuple(header.specs), dict.fromkeys(header.specs, reason), ())
        method = METHODS[kind]
        keys: dict[str, dict[str, str]] = {}
        shared: dict[str, str] = {}
        extras = []
        for key in header.specs:
            module, _, leaf = key.removesuffix(".weight").rpartition(".")
            if key.startswith(PREFIX) and leaf in method.slots:
                keys.setdefault(module.removeprefix(PREFIX), {})[method.slots[leaf]] = key
                continue
            extras.append(key)
            if (slot := method.shared.get(key.removeprefix(SHARED_PREFIX).removesuffix(".weight"))) is not None:
                shared[slot] = key
        if method.indispensable and not keys:
            raise AdapterError(f"{header.path}: {method.indispensable}")
        for pattern in ("rank_pattern", "alpha_pattern"):
            if not isinstance(header.config.get(pattern) or {}, dict):
                raise InputError(f"{header.path}: {pattern} in adapter_config.json is not an object")
        warnings = []
        if hints.alpha is not None:
            warnings.append("the alpha given is ignored: this dialect keeps it in its config")
        if header.config.get("sample_at_inference"):
            warnings.append("it adds noise at inference (sample_at_inference); the delta is that of the mean")
        bound = cls(header.config, method, keys, shared, tuple(extras), {}, tuple(warnings))
        if hints.base_shape is None or len(shared) == len(method.shared):
            return bound
        return replace(bound, largest=bound._largest(header, hints.base_shape))

    def _largest(self, header: Header, base_shape: Callable[[str], tuple[int, ...] | None]) -> tuple[int, int] | None:
        shapes = []
        for target in self.keys:
            shape = base_shape(self.parameter(target))
            if shape is None or len(shape) != 2:
                raise AdapterError(
                    f"{header.path}: the base has no matrix {self.parameter(target)}; is it the right base?"
                )
            shapes.append(shape[::-1] if self.layout(target).transposed else shape)
        return (max(m for m, _ in shapes), max(n for _, n in shapes)) if shapes else None

    def copies(self) -> Mapping[str, str]:
        """PEFT saves RandLoRA's shared projections once more for every module, and does not ask for these."""
        found = {}
        for key in self.extras:
            slot = self.method.shared.get(key.removesuffix(".weight").rpartition(".")[2], "")
            if slot in self.shared and key != self.shared[slot]:
                found[key] = self.shared[slot]
        return found

    def as_lora(self, parts: Mapping[str, Part], extras: tuple[str, ...]) -> Peft:
        kept = {field: self.config[field] for field in _SHARED_FIELDS if field in self.config}
        if not extras:
            kept.pop("modules_to_save", None)
        return replace(Peft.compose(parts, Order(config=kept)), extras=extras)

    @classmethod
    def arrange(cls, modules: Mapping[Module, tuple[int, ...] | None], order: Order) -> Mapping[str, Placement]:
        return Peft.arrange(modules, order)

    @classmethod
    def lacks(cls, layout: Layout, slots: Set[str]) -> str | None:
        if slots and slots <= _OF_EITHER_ORIENTATION and layout.experts == 1 and not layout.embedding:
            return None
        return super().lacks(layout, slots)

    @classmethod
    def compose(cls, parts: Mapping[str, Part], order: Order) -> Self:
        """The dialect of a new adapter, with the config carried along where that says the same."""
        fresh = config_for(parts, order.config)
        spelt = {slot: suffix for suffix, slot in METHODS[fresh["peft_type"]].slots.items()}
        keys = {t: {slot: f"{PREFIX}{t}.{spelt[slot]}" for slot in part.slots} for t, part in parts.items()}
        bound = cls(fresh, METHODS[fresh["peft_type"]], keys, {}, (), {}, ())
        told = {key: value for key, value in fresh.items() if key in ("target_modules", "fan_in_fan_out")}
        before = replace(bound, config={**told, **order.config})
        same = order.config.get("peft_type") == fresh["peft_type"] and all(
            math.isclose(before.scale(t, part.rank, None), part.scale, rel_tol=1e-6) for t, part in parts.items()
        )
        if fresh["peft_type"] == "SHIRA":  # whose rank says how many entries PEFT makes room for
            same = same and order.config.get("r", 32) == fresh["r"]
        if fresh["peft_type"] in ("FOURIERFT", "WAVEFT"):
            same = same and counts_stated(order.config, parts)
            same = same and all(before.settings(target) == part.settings for target, part in parts.items())
        return before if same else bound

    def carried_config(self) -> Mapping[str, Any]:
        return self.config

    def kept_config(self, targets: Set[str], *, portable: bool, without_extras: bool) -> Mapping[str, Any]:
        same = targets == set(self.keys)
        return still_true(self.carried_config(), same_targets=same, portable=portable, without_extras=without_extras)

    def references(self, target: str) -> Mapping[str, str]:
        if not self.method.numbered:
            return self.shared
        key = f"{SHARED_PREFIX}tinylora_v.{tinylora_group(self.config, self._numbers[target], len(self.keys))}"
        return {"tinylora_v": key} if key in self.extras else {}

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {target: index for index, target in enumerate(in_model_order(self.keys))}

    def settings(self, target: str) -> Mapping[str, Any]:
        found = self.method.settings(self.config, target)
        if self.method.numbered:
            alone = tinylora_group(self.config, len(self.keys) - 1, len(self.keys)) == 0
            seed = tinylora_seed(self.config, self._numbers[target])
            found = {**found, "seed": seed, "one_vector": alone, "known_order": is_known_order(self.keys)}
        return found if self.largest is None else {**found, "largest": self.largest}

    def place(self, target: str) -> Placement | None:
        return placed(target, self._component)

    @cached_property
    def _component(self) -> str:
        return component_of(self.keys)

    def spell(self, target: str, slot: str) -> str:
        return self.keys[target][slot]

    def layout(self, target: str) -> Layout:
        table = not _OF_TABLES.isdisjoint(self.keys[target])
        return Layout(transposed=table or bool(self.config.get("fan_in_fan_out")), embedding=table)

    def scale_key(self, target: str) -> str | None:
        return None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        try:
            scale = self.method.scale(self.config, target)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise InputError(f"adapter_config.json: its rank and alpha make no scale for {target}: {error}") from error
        if not math.isfinite(scale):
            raise InputError(f"adapter_config.json: its rank and alpha make the scale {scale} for {target}")
        return scale

    def writable_scale(self, target: str, rank: int, scale: float, mode: ScaleMode) -> float:
        return self.scale(target, rank, None)

    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        return Declaration(self.config, metadata)

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
        """Modules and biases saved whole, as far as the method or the config says that there are any."""
        whole = [key for key in self.extras if key.startswith(PREFIX) and key.endswith((".weight", ".bias"))]
        if self.method.slots:
            saved = [f".{name}." for name in self.config.get("modules_to_save") or ()] + [".base_layer."]
            ends = ".bias" if self.config.get("bias", "none") != "none" else "\0"
            whole = [key for key in whole if key.endswith(ends) or any(name in key for name in saved)]
        return {key: whole_parameter(key) for key in whole}


def _kind(config: Config) -> str:
    return str(config.get("peft_type", "")).upper()
