"""MLX-LM: `adapters.safetensors` beside an adapter_config.json with `fine_tune_type`; factors are (n, r) and (r, m)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools.errors import InputError, OutputError, UnmappedModuleError, UnsupportedInTargetError
from loratools.families.base import Layout
from loratools.formats.base import Declaration, Format, Header, Hints, NestedScaling, Order, Part, ScaleMode, Written
from loratools.formats.modules import Module, Placement, lone
from loratools.formats.read_only import number

if TYPE_CHECKING:
    from typing_extensions import Self

    from loratools.formats.packing import Packing

DEFAULT_SCALE = 20.0  # of mlx-examples, whose configs stated none
_KEY = re.compile(r"^(?P<target>.+)\.(?P<part>lora_a|lora_b|m)$")
_SLOTS = {"lora_a": "down", "lora_b": "up", "m": "magnitude"}
_RULE = "MLX names"
_SPELLINGS = {slot: part for part, slot in _SLOTS.items()}
# The factors of an embedding lie as those of a linear layer do; its name tells, or the base.
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|(\w+_)?embed(ding)?s?(_tokens)?)$")


@final
@dataclass(frozen=True)
class Mlx(Format):
    """One rank and one scale for the whole file; `config` None stands for a weights file alone.

    Linear a (n, r), b (r, m); embedding a (num, r), b (r, dim); experts a (experts, r, n), b (experts, m, r). DoRA has
    a magnitude m for each output, or for each row of an embedding. A fully tuned layer is stored as it is.
    """

    name: ClassVar[str] = "mlx"
    weights_name: ClassVar[str] = "adapters.safetensors"
    framework: ClassVar[str] = "mlx"
    holds: ClassVar[frozenset[str]] = frozenset({"lora", "dora"})
    uniform: ClassVar[bool] = True

    config: Mapping[str, Any] | None
    stated: float | None  # the scale, where it does not follow from alpha
    alpha: float | None
    keys: Mapping[str, Mapping[str, str]]
    layouts: Mapping[str, Layout]
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]

    @classmethod
    def recognises(cls, header: Header) -> bool:
        config = header.config or {}
        if "peft_type" in config:
            return False
        if "fine_tune_type" in config or "lora_parameters" in config:
            return True
        # GGUF appends the same suffixes to the names of parameters, MLX to those of modules.
        stems = (key[: -len(".lora_a")] for key in header.specs if key.endswith((".lora_a", ".lora_b")))
        return any(not stem.endswith(".weight") for stem in stems)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        keys: dict[str, dict[str, str]] = {}
        extras = []
        is_full = (header.config or {}).get("fine_tune_type") == "full"
        for key in header.specs:
            match = None if is_full else _KEY.match(key)
            if match is None:
                extras.append(key)
            else:
                keys.setdefault(match["target"], {})[_SLOTS[match["part"]]] = key
        layouts = {target: _layout(header, target, slots, hints) for target, slots in keys.items()}
        stated, alpha, warnings = (None, None, []) if is_full else _scale(header, hints)
        return cls(header.config, stated, alpha, keys, layouts, tuple(extras), {}, tuple(warnings))

    @classmethod
    def lacks(cls, layout: Layout, slots: Set[str]) -> str | None:
        if "magnitude" in slots and layout.magnitude_axis != int(layout.embedding):
            return "a magnitude per column of an embedding" if layout.embedding else "a magnitude per input"
        if layout.embedding:
            return None
        return super().lacks(layout, slots)

    @classmethod
    def arrange(cls, modules: Mapping[Module, tuple[int, ...] | None], order: Order) -> Mapping[str, Placement]:
        for module, shape in modules.items():
            if module.component:
                raise UnmappedModuleError(f"MLX-LM adapts language models, and {module} is a part of an image model")
            if shape is not None and len(shape) != 2:
                raise UnsupportedInTargetError(f"{module}: MLX-LM adapts matrices only, and this weight is {shape}")
        return {module.path: lone(_RULE, "", module.path) for module in modules}

    @classmethod
    def compose(cls, parts: Mapping[str, Part], order: Order) -> Self:
        """The dialect of a new adapter, with the scale that most targets have and every layer of the model adapted.

        A module that lies in the layers adapted and is not in the file stays as it is, so that -1 is always safe.
        """
        with_magnitude = [target for target, part in parts.items() if "magnitude" in part.slots]
        if with_magnitude and len(with_magnitude) < len(parts):
            other = next(target for target, part in parts.items() if "magnitude" not in part.slots)
            raise UnsupportedInTargetError(
                f"an MLX-LM file is DoRA for all targets or for none: {with_magnitude[0]} has a magnitude and {other} "
                "has none; approximate the first as LoRA, or convert the adapter to peft"
            )
        stated = Counter(part.scale for part in parts.values()).most_common(1)[0][0]
        before = order.config.get("lora_parameters")
        known = before if isinstance(before, Mapping) else {}
        if _same(number(known, "scale", "the config carried along"), stated):
            stated = float(known["scale"])
        config: dict[str, Any] = {
            "fine_tune_type": "dora" if with_magnitude else "lora",
            "num_layers": -1,
            "lora_parameters": {
                "rank": max(part.rank for part in parts.values()),
                "scale": stated,
                "dropout": 0.0,
                "keys": sorted({_within_block(target) for target in parts}),
            },
        }
        keys = {t: {slot: f"{t}.{_SPELLINGS[slot]}" for slot in part.slots} for t, part in parts.items()}
        layouts = {target: part.layout for target, part in parts.items()}
        return cls(config | dict(order.config), stated, None, keys, layouts, (), {}, ())

    def carried_config(self) -> Mapping[str, Any]:
        return self.config or {}

    def place(self, target: str) -> Placement | None:
        return lone(_RULE, "", target)

    def packing(self, target: str, slot: str) -> Packing:
        return "stacked" if self.layouts[target].experts > 1 else "transposed"

    def spell(self, target: str, slot: str) -> str:
        return self.keys[target].get(slot) or f"{target}.{_SPELLINGS[slot]}"

    def layout(self, target: str) -> Layout:
        return self.layouts[target]

    def scale_key(self, target: str) -> str | None:
        return None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        if self.stated is not None:
            return self.stated
        return (1.0 if self.alpha is None else self.alpha) / rank

    def writable_scale(self, target: str, rank: int, scale: float, mode: ScaleMode) -> float:
        # one scale for all targets, so also for those that are carried over as they are
        return self.scale(target, rank, None)

    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        ranks, scales = {w.rank for w in written.values()}, {w.scale for w in written.values()}
        if len(ranks) > 1 or len(scales) > 1:
            raise OutputError(
                f"an MLX-LM file has one rank and one scale, not ranks {min(ranks)} to {max(ranks)}; choose one rank "
                "that all targets can have (--rank), or convert to peft first: loratools convert --to peft"
            )
        parameters = (self.config or {}).get("lora_parameters")
        if self.config is None or not ranks:
            return Declaration(self.config, metadata)
        rank, scale = ranks.pop(), scales.pop()
        before = parameters if isinstance(parameters, dict) else {}
        if before.get("rank", rank) == rank and math.isclose(scale, self.scale("", rank, None), rel_tol=1e-12):
            return Declaration(self.config, metadata)
        true = {key: value for key, value in before.items() if key != "alpha"} | {"rank": rank, "scale": scale}
        return Declaration(dict(self.config) | {"lora_parameters": true}, metadata)

    def parameter(self, target: str) -> str:
        return f"{target}.weight"

    @property
    def nested_scaling(self) -> NestedScaling | None:
        return None

    def is_stored_transposed(self, target: str) -> bool:
        return self.layouts[target].experts == 1

    def without_mutation(self) -> Self:
        return self

    def replacements(self) -> Mapping[str, str]:
        return {key: key for key in self.extras}


def _within_block(target: str) -> str:
    """A module's path within its block, which is the same in all layers; the whole path of one outside of them."""
    return re.sub(r"^(?:.*?\.)?\d+\.(?=.)", "", target)


def _same(stated: float | None, scale: float) -> bool:
    """Whether a scale is the one stated, but for the rounding of an alpha on the way."""
    return stated is not None and math.isclose(stated, scale, rel_tol=1e-6)


def _layout(header: Header, target: str, slots: Mapping[str, str], hints: Hints) -> Layout:
    down = header.specs[slots["down"]].shape if "down" in slots else ()
    if len(down) == 3:
        # one expert is a stack too, which `experts` cannot say
        if down[0] == 1:
            raise InputError(f"{header.path}: {target} is a stack of one expert, which is not supported")
        return Layout(experts=down[0])
    up = header.specs[slots["up"]].shape if "up" in slots else ()
    base = hints.base_shape(f"{target}.weight") if hints.base_shape else None
    is_embedding = _EMBEDDING.search(target) is not None
    if base is not None and len(down) == len(up) == 2 and down[0] != up[1]:
        is_embedding = base == (down[0], up[1])
    if is_embedding:
        return Layout(transposed=True, embedding=True, magnitude_axis=1 if "magnitude" in slots else 0)
    return Layout()


def _scale(header: Header, hints: Hints) -> tuple[float | None, float | None, list[str]]:
    """(scale, alpha, warnings): one of the first two, or neither where nobody knows."""
    if header.config is None:
        if hints.alpha is not None:
            return None, hints.alpha, []
        return (
            None,
            None,
            ["no adapter_config.json: the scale is unknown, so norms are for alpha 1; state it with --alpha"],
        )
    ignored = ["the alpha given is ignored: adapter_config.json states the scale"] if hints.alpha is not None else []
    parameters = header.config.get("lora_parameters") or {}
    if not isinstance(parameters, dict):
        raise InputError(f"{header.path}: lora_parameters in adapter_config.json is not an object")
    if (scale := number(parameters, "scale", "adapter_config.json")) is not None:
        return scale, None, ignored
    if (alpha := number(parameters, "alpha", "adapter_config.json")) is not None:
        return None, alpha, ignored
    if hints.alpha is not None:
        return None, hints.alpha, []
    return DEFAULT_SCALE, None, [f"adapter_config.json states no scale; MLX-LM then took {DEFAULT_SCALE:g}"]
