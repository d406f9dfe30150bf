"""ComfyUI and the models' own repositories: dotted native paths, with the suffixes of kohya and LyCORIS or of PEFT."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import InputError, UnmappedModuleError
from loratools.families.base import Layout
from loratools.formats.base import Declaration, Format, Header, Hints, NestedScaling, Order, Part, ScaleMode, Written
from loratools.formats.kohya import declared_alphas, is_per_input, magnitude_shape, new_keys, stored_alpha
from loratools.formats.kohya_names import clip_path
from loratools.formats.layouts import Model, from_native, native_placements
from loratools.formats.modules import BIAS, Module, Piece, Placement, lone, of_bias, with_biases
from loratools.formats.suffixes import (
    ALPHA,
    BIAS_SLOTS,
    KINDRED,
    LYCORIS,
    SLOTS,
    SUFFIXES,
    UNSUPPORTED,
    changes_bias,
    is_slot,
    place,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from loratools.storage.base import TensorSpec

DIFFUSION = "diffusion_model."
_PEFT = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_A": "down",
    "lora_B": "up",
}
_SUFFIXES = sorted([*SLOTS, *BIAS_SLOTS, *UNSUPPORTED, *_PEFT, ALPHA], key=len, reverse=True)
_SUFFIX = re.compile(rf"\.({'|'.join(map(re.escape, _SUFFIXES))})$")
_NATIVE = re.compile(
    r"(diffusion_model\.|text_encoders\.|double_blocks\.\d|single_blocks\.\d|joint_blocks\.\d|blocks\.\d|"
    r"transformer_blocks\.\d|single_transformer_blocks\.\d|input_blocks\.\d|output_blocks\.\d|middle_block\.\d)"
)
_TEXT = re.compile(r"text_encoders\.(clip_l|clip_g|t5xxl)\.transformer\.(.+)$")


@final
@dataclass(frozen=True)
class Comfy(Format):
    """Adapters under the names of the model's authors; alpha missing means alpha = rank."""

    name: ClassVar[str] = "comfy"
    holds: ClassVar[frozenset[str]] = LYCORIS
    biases: ClassVar[bool] = True
    kindred: ClassVar[Mapping[str, str]] = KINDRED
    slots: ClassVar[frozenset[str]] = frozenset({"down", "up", "mid", "magnitude"})

    keys: Mapping[str, Mapping[str, str]]
    alphas: Mapping[str, TensorSpec]
    per_input: frozenset[str]
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return header.config is None and any(
            _NATIVE.match(module) and ".processor" not in module and any(_is_update(s, siblings) for s in siblings)
            for module, siblings in _by_module(header).items()
        )

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        keys: dict[str, dict[str, str]] = {}
        alphas: dict[str, TensorSpec] = {}
        unsupported: dict[str, str] = {}
        extras: list[str] = []
        for module, siblings in _by_module(header).items():
            reason = next((UNSUPPORTED[s] for s in siblings if s in UNSUPPORTED), None)
            for suffix, key in siblings.items():
                if reason is not None:
                    unsupported[module] = reason
                    extras.append(key)
                elif suffix == ALPHA:
                    alphas[module] = header.specs[key]
                elif _is_update(suffix, siblings):
                    spec = header.specs[key]
                    target, slot = (module, _PEFT[suffix]) if suffix in _PEFT else place(module, suffix, spec.shape)
                    if (other := keys.setdefault(target, {}).setdefault(slot, key)) != key:
                        raise InputError(f"{header.path}: {target} has two tensors for {slot}: {other} and {key}")
                else:
                    extras.append(key)
        warnings = []
        for target in [t for t in alphas if t not in keys]:
            extras.append(f"{target}.{ALPHA}")
            del alphas[target]
            warnings.append(f"{target}: an alpha without factors, carried over unchanged")
        if hints.alpha is not None:
            warnings.append("the alpha given is ignored: this dialect states one for each module")
        per_input = frozenset(t for t, slots in keys.items() if "magnitude" in slots and is_per_input(header, slots))
        return cls(keys, alphas, per_input, tuple(extras), unsupported, tuple(warnings))

    @classmethod
    def arrange(cls, modules: Mapping[Module, tuple[int, ...] | None], order: Order) -> Mapping[str, Placement]:
        try:
            return with_biases(modules, lambda here: arrange(here, order.model))
        except KeyError as error:
            raise UnmappedModuleError(f"ComfyUI has no name for {error.args[0]}") from error

    @classmethod
    def magnitude_shape(cls, part: Part, count: int) -> tuple[int, ...]:
        return magnitude_shape(part, count)

    @classmethod
    def compose(cls, parts: Mapping[str, Part], order: Order) -> Self:
        """The dialect of a new file, in the suffixes that every version of ComfyUI reads."""
        keys = new_keys(parts)
        per_input = frozenset(t for t, part in parts.items() if part.layout.magnitude_axis == 1)
        return cls(keys, {}, per_input, (), {}, ())

    def place(self, target: str) -> Placement | None:
        if changes_bias(self.keys[target]):
            return of_bias(self._placed(target.removesuffix(BIAS)))
        return self._placed(target)

    def _placed(self, target: str) -> Placement | None:
        if (text := _TEXT.match(target)) is not None:
            last = "text_encoder_2" if any(".double_blocks." in t for t in self.keys) else "text_encoder_3"
            component = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": last}[text[1]]
            return lone("ComfyUI names", component, clip_path(text[2]))
        path = target.removeprefix(DIFFUSION)
        if (native := from_native(path)) is not None:
            rule, parts = native
            component = "unet" if rule == "SDXL names" else "transformer"
            return Placement(rule, tuple(Piece(Module(component, name), rows) for name, rows in parts))
        if not _NATIVE.match(target):
            return None
        return lone("ComfyUI names", "unet" if self._is_unet else "transformer", path)

    @cached_property
    def _is_unet(self) -> bool:
        return any(re.match(r"(diffusion_model\.)?(down_blocks|up_blocks|mid_block)\.", target) for target in self.keys)

    def spell(self, target: str, slot: str) -> str:
        known = self.keys[target]
        return known.get(slot) or f"{target}.{SUFFIXES[slot]}"

    def layout(self, target: str) -> Layout:
        return Layout(magnitude_axis=1 if target in self.per_input else 0)

    def scale_key(self, target: str) -> str | None:
        return f"{target}.{ALPHA}" if target in self.alphas else None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return stored_alpha / rank if stored_alpha is not None and rank else 1.0

    def writable_scale(self, target: str, rank: int, scale: float, mode: ScaleMode) -> float:
        if mode == "fold":
            return 1.0
        return stored_alpha(scale * rank, self.alphas.get(target))[0] / rank if rank else 1.0

    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        return Declaration(None, metadata, declared_alphas(written, self.alphas))

    def parameter(self, target: str) -> str:
        return target if changes_bias(self.keys[target]) else f"{target}.weight"

    @property
    def nested_scaling(self) -> NestedScaling | None:
        return None

    def is_stored_transposed(self, target: str) -> bool:
        return False

    def without_mutation(self) -> Self:
        return self

    def replacements(self) -> Mapping[str, str]:
        return {key: key for key in self.extras if key.endswith(".scale") and _NATIVE.match(key)}


def _by_module(header: Header) -> dict[str, dict[str, str]]:
    """Module -> suffix -> key."""
    modules: dict[str, dict[str, str]] = {}
    for key in header.specs:
        match = _SUFFIX.search(key)
        module, suffix = (key[: match.start()], match[1]) if match else (key, "")
        modules.setdefault(module, {})[suffix] = key
    return modules


def _is_update(suffix: str, siblings: Mapping[str, str]) -> bool:
    return suffix in _PEFT or suffix in UNSUPPORTED or is_slot(suffix, siblings)


def arrange(modules: Collection[Module], model: Model | None) -> dict[str, Placement]:
    """ComfyUI's targets for these modules; KeyError for a module that it has no name for."""
    targets: dict[str, Placement] = {}
    for component in dict.fromkeys(m.component for m in modules):
        here = [m for m in modules if m.component == component]
        if component.startswith("text_encoder"):
            t5 = {"text_encoder_2"} if model == "flux" else {"text_encoder_3"}
            name = "t5xxl" if component in t5 else "clip_l" if component == "text_encoder" else "clip_g"
            targets |= {
                f"text_encoders.{name}.transformer.{m.path}": Placement("ComfyUI names", (Piece(m),)) for m in here
            }
        elif component in ("unet", "transformer"):
            native = native_placements(here, model, component) if model not in (None, "sd", "qwen") else None
            if native is None or (component == "unet") != (model == "sdxl"):
                native = {m.path: Placement("ComfyUI names", (Piece(m),)) for m in here}
            targets |= {f"{DIFFUSION}{path}": placement for path, placement in native.items()}
        else:
            raise KeyError(here[0])
    return targets
