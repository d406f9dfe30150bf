"""kohya-ss sd-scripts: one flattened module path, one dot, and a suffix; an `alpha` tensor beside each pair."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import AdapterError
from loratools.families import family_of
from loratools.families.base import Layout
from loratools.formats.base import Declaration, Format, Header, Hints, NestedScaling, ScaleMode, Written
from loratools.formats.suffixes import ALPHA, SUFFIXES, UNSUPPORTED, is_slot, place
from loratools.storage.base import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

_ALPHA = TensorSpec("F32", ())


@final
@dataclass(frozen=True)
class Kohya(Format):
    """kohya and LyCORIS files; alpha missing or zero means alpha = rank, as in sd-scripts.

    A module may be of any family. A change of its bias is a target of its own, `<module>.bias`.
    """

    name: ClassVar[str] = "kohya"
    stale: ClassVar[tuple[str, ...]] = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")

    keys: Mapping[str, Mapping[str, str]]
    alphas: Mapping[str, TensorSpec]
    per_input: frozenset[str]
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]

    @classmethod
    def recognises(cls, header: Header) -> bool:
        modules = _by_module(header)
        return any(
            suffix in UNSUPPORTED or is_slot(suffix, siblings) for siblings in modules.values() for suffix in siblings
        )

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Kohya:
        groups: dict[str, dict[str, str]] = {}
        alphas: dict[str, TensorSpec] = {}
        unsupported: dict[str, str] = {}
        extras: list[str] = []
        modules = _by_module(header)
        for key in header.specs:
            module, _, suffix = key.partition(".")
            if reasons := [UNSUPPORTED[s] for s in modules[module] if s in UNSUPPORTED]:
                unsupported[module] = reasons[0]
                extras.append(key)
            elif suffix == ALPHA:
                alphas[module] = header.specs[key]
            elif is_slot(suffix, modules[module]):
                target, slot = place(module, suffix, header.specs[key].shape)
                if (other := groups.setdefault(target, {}).setdefault(slot, key)) != key:
                    raise AdapterError(f"{header.path}: {target} has two tensors for {slot}: {other} and {key}")
            else:
                extras.append(key)
        warnings = []
        for target in [t for t in alphas if t not in groups]:
            extras.append(f"{target}.alpha")
            del alphas[target]
            warnings.append(f"{target}: an alpha without factors, carried over unchanged")
        if hints.alpha is not None:
            warnings.append("the alpha given is ignored: this dialect states one for each module")
        per_input = frozenset(t for t, slots in groups.items() if "magnitude" in slots and _is_per_input(header, slots))
        return cls(groups, alphas, per_input, tuple(extras), unsupported, tuple(warnings))

    def spell(self, target: str, slot: str) -> str:
        return self.keys[target].get(slot) or f"{target}.{SUFFIXES[slot]}"

    def layout(self, target: str) -> Layout:
        return Layout(magnitude_axis=1 if target in self.per_input else 0)

    def scale_key(self, target: str) -> str | None:
        return f"{target}.alpha" if target in self.alphas else None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        if stored_alpha is not None and not math.isfinite(stored_alpha):
            return stored_alpha  # which is refused, also where alpha is no scale
        return stored_alpha / rank if stored_alpha and rank else 1.0

    def writable_scale(self, target: str, rank: int, scale: float, mode: ScaleMode) -> float:
        if mode == "fold":
            return 1.0
        value, _ = _stored(scale * rank, self.alphas.get(target, _ALPHA))
        return value / rank

    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        scalars = {}
        for target, w in written.items():
            spec = self.alphas.get(target, _ALPHA)
            if w.rank == 0 and w.alpha is not None:  # a number of the method's own, or one that nobody reads
                scalars[f"{target}.alpha"] = (w.alpha, spec)
            elif w.rank and (target in self.alphas or w.scale != 1.0):
                scalars[f"{target}.alpha"] = _stored(w.scale * w.rank, spec)
        return Declaration(None, _true_metadata(metadata, written), scalars)

    def parameter(self, target: str) -> str:
        return target if "." in target else f"{target}.weight"

    @property
    def nested_scaling(self) -> NestedScaling | None:
        return None

    def is_stored_transposed(self, target: str) -> bool:
        return False

    def without_mutation(self) -> Kohya:
        return self

    def replacements(self) -> Mapping[str, str]:
        return {}


def _by_module(header: Header) -> dict[str, dict[str, str]]:
    """Module -> suffix -> key."""
    modules: dict[str, dict[str, str]] = {}
    for key in header.specs:
        module, _, suffix = key.partition(".")
        modules.setdefault(module, {})[suffix] = key
    return modules


def _is_per_input(header: Header, slots: Mapping[str, str]) -> bool:
    """A magnitude (1, inputs, ...) runs along the inputs, one of a single number where that is not the only output."""
    magnitude = header.specs[slots["magnitude"]]
    if len(magnitude.shape) < 2 or magnitude.shape[0] != 1:
        return False
    try:
        family = family_of(slots)
    except AdapterError:
        return False  # which is reported where the update is read
    specs = {slot: header.specs[key] for slot, key in slots.items()}
    return magnitude.numel != 1 or family.check(specs, Layout()) is not None


def _stored(alpha: float, spec: TensorSpec) -> tuple[float, TensorSpec]:
    """The value and spec that hold alpha: the file's own dtype, or float32 where that would round it."""
    single: float = struct.unpack("<f", struct.pack("<f", alpha))[0]
    wide = TensorSpec("F32", spec.shape)
    if spec.dtype == "F64":
        return alpha, spec
    if spec.dtype.startswith(("I", "U")):
        return (float(round(alpha)), spec) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else (single, wide)
    if spec.dtype == "BF16" and struct.pack("<f", single)[:2] == b"\0\0":
        return single, spec
    if spec.dtype == "F16" and abs(single) <= 65504 and struct.unpack("<e", struct.pack("<e", single))[0] == single:
        return single, spec
    return single, wide


def _true_metadata(metadata: Mapping[str, str], written: Mapping[str, Written]) -> dict[str, str]:
    """Rank and alpha fields restated as sd-scripts spells them, `Dynamic` where modules differ."""
    true = dict(metadata)
    ranked = [w for w in written.values() if w.rank]  # the others have none to state
    ranks, alphas = {w.rank for w in ranked}, {w.rank * w.scale for w in ranked}
    if "ss_network_dim" in true and ranks:
        true["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    if "ss_network_alpha" in true and alphas:
        true["ss_network_alpha"] = f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic"
    return true
