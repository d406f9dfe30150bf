"""llama.cpp's LoRA: `<tensor>.lora_a` and `.lora_b` in a GGUF file, one alpha for all, a rank for each."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools.errors import InputError, NeedsBaseError, TiedEmbeddingError, UnmappedModuleError
from loratools.families.base import Layout
from loratools.formats.base import Declaration, Format, Header, Hints, NestedScaling, Order, Part, ScaleMode, Written
from loratools.formats.layouts import llama_cpp
from loratools.formats.modules import Module, Piece, Placement

if TYPE_CHECKING:
    from typing_extensions import Self

_SUFFIXES = {".weight.lora_a": "down", ".weight.lora_b": "up"}
_SPELLINGS = {slot: suffix for suffix, slot in _SUFFIXES.items()}
_ARCH, _TYPE, _KIND, _ALPHA = "general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"
_TOKENS = "adapter.alora.invocation_tokens"


@final
@dataclass(frozen=True)
class Gguf(Format):
    """scale = alpha / rank, and 1 where alpha is missing or 0; q and k of Llama-like models with interleaved heads."""

    name: ClassVar[str] = "gguf"
    holds: ClassVar[frozenset[str]] = frozenset({"lora"})
    slots: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    container: ClassVar[str] = "gguf"

    arch: str
    alpha: float | None
    model_config: Mapping[str, Any]
    keys: Mapping[str, Mapping[str, str]]
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]
    quantised: bool = False

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return _ARCH in header.metadata

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        metadata = header.metadata
        if metadata.get(_TYPE) != "adapter":
            raise InputError(f"{header.path}: is a GGUF {metadata.get(_TYPE, 'model')}, not an adapter")
        if metadata.get(_KIND) != "lora":
            raise InputError(f"{header.path}: is a GGUF adapter of type {metadata.get(_KIND)!r}, not a LoRA")
        try:
            alpha = float(metadata[_ALPHA]) if _ALPHA in metadata else None
        except ValueError as error:
            raise InputError(f"{header.path}: {_ALPHA} is {metadata[_ALPHA]!r}, not a number") from error
        keys: dict[str, dict[str, str]] = {}
        extras = []
        for key in header.specs:
            suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
            if suffix is None:
                extras.append(key)
            else:
                keys.setdefault(key.removesuffix(suffix), {})[_SUFFIXES[suffix]] = key
        warnings = []
        if hints.alpha is not None:
            warnings.append("the alpha given is ignored: this dialect states its own")
        if _TOKENS in metadata:
            warnings.append("an activated LoRA: it applies only after its invocation tokens, and must not be merged")
        return cls(metadata[_ARCH], alpha or None, hints.base_config or {}, keys, tuple(extras), {}, tuple(warnings))

    @classmethod
    def lacks(cls, layout: Layout, slots: Set[str]) -> str | None:
        return "a stack of experts" if layout.experts > 1 else None

    @classmethod
    def arrange(cls, modules: Mapping[Module, tuple[int, ...] | None], order: Order) -> Mapping[str, Placement]:
        arch = _architecture(order)
        tied = llama_cpp.is_tied(order.model_config)
        targets: dict[str, Placement] = {}
        for module, shape in modules.items():
            name = llama_cpp.to_native(module.path)
            if name is None:
                raise UnmappedModuleError(f"llama.cpp has no name for {module} of the architecture {arch}")
            if shape is not None and len(shape) != 2:
                raise UnmappedModuleError(f"{module}: llama.cpp adapts matrices only, and this weight is {shape}")
            if tied and name in ("token_embd", "output"):
                raise TiedEmbeddingError(
                    f"{module}: the model ties its input and output embeddings, which llama.cpp keeps as one tensor; "
                    "an update of one of them cannot be told apart (llama.cpp aborts); merge it into the base instead"
                )
            rows = llama_cpp.rows_of(name, arch, order.model_config)
            if rows is None:
                raise NeedsBaseError(f"{module}: the base's config does not state its number of attention heads")
            if name in targets:
                raise UnmappedModuleError(f"{module} and {targets[name].pieces[0].module} are both {name} in llama.cpp")
            targets[name] = Placement("llama.cpp names", (Piece(module, rows),))
        return targets

    @classmethod
    def compose(cls, parts: Mapping[str, Part], order: Order) -> Self:
        keys = {t: {slot: f"{t}{_SPELLINGS[slot]}" for slot in part.slots} for t, part in parts.items()}
        alphas = Counter(_single(part.rank * part.scale) for part in parts.values())
        alpha = alphas.most_common(1)[0][0] if alphas else None
        return cls(_architecture(order), alpha or None, order.model_config, keys, (), {}, (), order.quantised)

    @classmethod
    def fresh_metadata(cls, order: Order) -> dict[str, str]:
        return {
            _ARCH: _architecture(order),
            _TYPE: "adapter",
            _KIND: "lora",
            "general.name": "LoRA",
            "general.quantization_version": "2",
        }

    def place(self, target: str) -> Placement | None:
        path = llama_cpp.from_native(target, self.arch)
        if path is None:
            return None
        rows = llama_cpp.rows_of(target, self.arch, self.model_config)
        if rows is None:
            raise NeedsBaseError(
                f"{target}: its rows are ordered by attention heads, whose number is in the base's config; "
                "pass --base with the model's folder or its config.json"
            )
        return Placement("llama.cpp names", (Piece(Module("", path), rows),))

    def spell(self, target: str, slot: str) -> str:
        return f"{target}{_SPELLINGS[slot]}"

    def layout(self, target: str) -> Layout:
        return Layout(transposed=True, embedding=True) if target == llama_cpp.EMBEDDING else Layout()

    def scale_key(self, target: str) -> str | None:
        return None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return 1.0 if self.alpha is None else self.alpha / rank

    def writable_scale(self, target: str, rank: int, scale: float, mode: ScaleMode) -> float:
        return self.scale(target, rank, None)

    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        fields = {key: value for key, value in metadata.items() if key != _ALPHA}
        alphas = {_single(w.rank * w.scale) for w in written.values()}
        if self.alpha is None and all(math.isclose(w.scale, 1.0, rel_tol=1e-12) for w in written.values()):
            return Declaration(None, fields)
        if len(alphas) > 1:
            raise InputError(f"llama.cpp states one alpha for all targets, and these have {sorted(alphas)[:4]}")
        return Declaration(None, {**fields, _ALPHA: repr(alphas.pop()) if alphas else "0.0"})

    def parameter(self, target: str) -> str:
        return f"{target}.weight"

    @property
    def nested_scaling(self) -> NestedScaling | None:
        return None

    def is_stored_transposed(self, target: str) -> bool:
        return False

    def transposed_slots(self, target: str) -> frozenset[str]:
        return frozenset({"down"}) if target == llama_cpp.EMBEDDING else frozenset()

    def without_mutation(self) -> Self:
        return self

    def replacements(self) -> Mapping[str, str]:
        return {}


def _architecture(order: Order) -> str:
    if not order.model_config:
        raise NeedsBaseError(
            "a GGUF file names the model's architecture and orders rows by its attention heads; pass --base with the "
            "model's folder or its config.json"
        )
    arch = llama_cpp.architecture(order.model_config)
    if arch is None:
        known = ", ".join(sorted(llama_cpp.ARCHITECTURES))
        raise UnmappedModuleError(
            f"no llama.cpp names are known for model_type {order.model_config.get('model_type')!r}; known are {known}"
        )
    return arch


def _single(value: float) -> float:
    number: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return number
