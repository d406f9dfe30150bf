"""kohya-ss sd-scripts: one flattened module path, one dot, and a suffix; an `alpha` tensor beside each pair."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import AdapterError, UnmappedModuleError
from loratools.families import family_of
from loratools.families.base import Layout
from loratools.formats import kohya_names
from loratools.formats.base import (
    Declaration,
    Format,
    Header,
    Hints,
    NestedScaling,
    Order,
    Part,
    ScaleMode,
    Written,
    check_plain,
)
from loratools.formats.modules import BIAS, Module, Placement, of_bias, with_biases
from loratools.formats.suffixes import (
    ALPHA,
    KINDRED,
    LYCORIS,
    SUFFIXES,
    UNSUPPORTED,
    changes_bias,
    is_slot,
    place,
    spelling,
)
from loratools.storage.base import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.formats.layouts import Model

_ALPHA = TensorSpec("F32", ())
_LARGEST_SINGLE = (2 - 2**-23) * 2.0**127
_VERSIONS: Mapping[Model, str] = {"sdxl": "sdxl_base_v1-0", "flux": "flux1", "sd3": "sd3m"}


@final
@dataclass(frozen=True)
class Kohya(Format):
    """kohya and LyCORIS files; alpha missing or zero means alpha = rank, as in sd-scripts.

    A module may be of any family. A change of its bias is a target of its own, `<module>.bias`.
    """

    name: ClassVar[str] = "kohya"
    flat: ClassVar[bool] = True
    holds: ClassVar[frozenset[str]] = LYCORIS
    biases: ClassVar[bool] = True
    kindred: ClassVar[Mapping[str, str]] = KINDRED
    slots: ClassVar[frozenset[str]] = frozenset({"down", "up", "mid", "magnitude"})
    stale: ClassVar[tuple[str, ...]] = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")

    keys: Mapping[str, Mapping[str, str]]
    alphas: Mapping[str, TensorSpec]
    per_input: frozenset[str]
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]

    @classmethod
    def recognises(cls, header: Header) -> bool:
        modules = by_module(header)
        return any(
            suffix in UNSUPPORTED or is_slot(suffix, siblings) for siblings in modules.values() for suffix in siblings
        )

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Kohya:
        groups: dict[str, dict[str, str]] = {}
        alphas: dict[str, TensorSpec] = {}
        unsupported: dict[str, str] = {}
        extras: list[str] = []
        modules = by_module(header)
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
        per_input = frozenset(t for t, slots in groups.items() if "magnitude" in slots and is_per_input(header, slots))
        return cls(groups, alphas, per_input, tuple(extras), unsupported, tuple(warnings))

    def as_lora(self, parts: Mapping[str, Part], extras: tuple[str, ...]) -> Kohya:
        check_plain(parts, self.name)
        if biased := [t for t, part in parts.items() if "up_bias" in part.slots]:
            raise AdapterError(f"{biased[0]}: changes a bias, for which {self.name} has no key; write PEFT instead")
        keys = {
            target: {slot: self.keys.get(target, {}).get(slot, f"{target}.{SUFFIXES[slot]}") for slot in part.slots}
            for target, part in parts.items()
        }
        alphas = {target: spec for target, spec in self.alphas.items() if target in parts}
        carried = {target: why for target, why in self.unsupported.items() if _has_key_of(target, extras)}
        return Kohya(keys, alphas, frozenset(), extras, carried, self.warnings)

    @classmethod
    def arrange(cls, modules: Mapping[Module, tuple[int, ...] | None], order: Order) -> Mapping[str, Placement]:
        try:
            return with_biases(modules, lambda here: kohya_names.arrange(here, order.model))
        except KeyError as error:
            raise UnmappedModuleError(f"sd-scripts has no name for {error.args[0]}") from error

    @classmethod
    def compose(cls, parts: Mapping[str, Part], order: Order) -> Kohya:
        keys = new_keys(parts)
        per_input = frozenset(t for t, part in parts.items() if part.layout.magnitude_axis == 1)
        return cls(keys, {}, per_input, (), {}, ())

    @classmethod
    def fresh_metadata(cls, order: Order) -> dict[str, str]:
        known = {"ss_network_module": "networks.lora", "ss_network_dim": "", "ss_network_alpha": ""}
        version = _VERSIONS.get(order.model) if order.model else None
        return known | ({"ss_base_model_version": version} if version else {})

    @classmethod
    def magnitude_shape(cls, part: Part, count: int) -> tuple[int, ...]:
        return magnitude_shape(part, count)

    def place(self, target: str) -> Placement | None:
        if changes_bias(self.keys[target]):
            return of_bias(kohya_names.place(target.removesuffix(BIAS), is_flux=self.is_flux))
        return kohya_names.place(target, is_flux=self.is_flux)

    @property
    def is_flux(self) -> bool:
        """Whether modules of FLUX are among the targets, which tells its text encoders from those of SD3."""
        return any("_double_blocks_" in t or "_single_blocks_" in t for t in self.keys)

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
        if mode == "fold" or not rank:
            return 1.0
        value, _ = stored_alpha(scale * rank, self.alphas.get(target))
        return value / rank

    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        return Declaration(None, _true_metadata(metadata, written), declared_alphas(written, self.alphas))

    def parameter(self, target: str) -> str:
        return target if changes_bias(self.keys[target]) else f"{target}.weight"

    @property
    def nested_scaling(self) -> NestedScaling | None:
        return None

    def is_stored_transposed(self, target: str) -> bool:
        return False

    def without_mutation(self) -> Kohya:
        return self

    def replacements(self) -> Mapping[str, str]:
        return {}


def _has_key_of(target: str, keys: tuple[str, ...]) -> bool:
    return any(key.partition(".")[0] == target for key in keys)


def new_keys(parts: Mapping[str, Part]) -> dict[str, dict[str, str]]:
    """The keys of a new file; a bias is named after its module, and that of a norm after the norm's weight."""
    keys = {}
    for target, part in parts.items():
        module = target.removesuffix(BIAS) if part.slots == ("diff",) else target
        if module != target:
            weight = parts.get(module)
            is_norm = weight is not None and weight.shape is not None and len(weight.shape) == 1
            keys[target] = {"diff": f"{module}.{'b_norm' if is_norm else 'diff_b'}"}
        else:
            keys[target] = {slot: f"{target}.{spelling(slot, part.shape)}" for slot in part.slots}
    return keys


def magnitude_shape(part: Part, count: int) -> tuple[int, ...]:
    """(m, 1) or (1, n), with ones for the kernel: as LyCORIS keeps what its norm does not sum over."""
    kernel = 0 if part.shape is None else len(part.shape) - 2
    ends = (1, count) if part.layout.magnitude_axis == 1 else (count, 1)
    return (*ends, *(1 for _ in range(kernel)))


def by_module(header: Header) -> dict[str, dict[str, str]]:
    """Module -> suffix -> key."""
    modules: dict[str, dict[str, str]] = {}
    for key in header.specs:
        module, _, suffix = key.partition(".")
        modules.setdefault(module, {})[suffix] = key
    return modules


def is_per_input(header: Header, slots: Mapping[str, str]) -> bool:
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


def declared_alphas(
    written: Mapping[str, Written], stored: Mapping[str, TensorSpec]
) -> dict[str, tuple[float, TensorSpec]]:
    """The alpha tensors of a file whose dialect has them, by key; `stored` are the specs of those that were read."""
    scalars = {}
    for target, w in written.items():
        if w.rank == 0 and w.alpha is not None:  # a number of the method's own, or one that nobody reads
            scalars[f"{target}.{ALPHA}"] = (w.alpha, stored.get(target, _ALPHA))
        elif w.rank and (target in stored or w.scale != 1.0):
            scalars[f"{target}.{ALPHA}"] = stored_alpha(w.scale * w.rank, stored.get(target))
    return scalars


def stored_alpha(alpha: float, spec: TensorSpec | None = None) -> tuple[float, TensorSpec]:
    """The value and spec that hold alpha: the file's own dtype, or a wider one where that would not hold it."""
    spec = spec or _ALPHA
    if spec.dtype == "F64" or abs(alpha) > _LARGEST_SINGLE:
        return alpha, TensorSpec("F64", spec.shape)
    single: float = struct.unpack("<f", struct.pack("<f", alpha))[0]
    wide = TensorSpec("F32", spec.shape)
    if spec.dtype.startswith(("I", "U")):
        bits = 8 * spec.nbytes // max(spec.numel, 1)
        low, high = (0, 2**bits - 1) if spec.dtype.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        whole = math.isclose(alpha, round(alpha), rel_tol=1e-12) and low <= round(alpha) <= high
        return (float(round(alpha)), spec) if whole else (single, wide)
    if spec.dtype == "BF16" and struct.pack("<f", single)[:2] == b"\0\0":
        return single, spec
    if spec.dtype == "F16" and abs(single) <= 65504 and struct.unpack("<e", struct.pack("<e", single))[0] == single:
        return single, spec
    return single, wide


def _true_metadata(metadata: Mapping[str, str], written: Mapping[str, Written]) -> dict[str, str]:
    """Rank and alpha fields restated, `Dynamic` where modules differ; kept while some module has the number stated.

    For sd-scripts they are what training began with, and convolutions and single blocks may have numbers of their own.
    """
    true = dict(metadata)
    ranked = [w for w in written.values() if w.rank]
    for name, numbers in (
        ("ss_network_dim", {float(w.rank) for w in ranked}),
        ("ss_network_alpha", {w.rank * w.scale for w in ranked}),
    ):
        if name in true and numbers and _number(true[name]) not in numbers:
            true[name] = f"{numbers.pop():g}" if len(numbers) == 1 else "Dynamic"
    return true


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
