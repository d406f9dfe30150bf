"""loratools' own dialect, for families that no other has a place for: keys `<target>.<slot>`, described in metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools.errors import AdapterError, InputError
from loratools.families.base import Layout
from loratools.formats.base import Declaration, Format, Header, Hints, NestedScaling, Order, Part, ScaleMode, Written
from loratools.formats.modules import COMPONENTS, Placement, lone
from loratools.formats.peft import Peft

if TYPE_CHECKING:
    from typing_extensions import Self

UPDATES_KEY = "loratools.updates"  # in the metadata: what the targets are
SHARED = "shared."  # begins the keys of tensors that several targets share
VERSION = 1
_PLAIN = Layout()
# Of one base weight, several times the largest there are: some families make all of it of a few numbers and its shape.
_MAX_NUMBERS = 2**33


@dataclass(frozen=True)
class Described:
    """What the metadata say of a target."""

    layout: Layout
    scale: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)  # slot -> key


@final
@dataclass(frozen=True)
class Native(Format):
    """`loratools.updates` in the metadata is a JSON object: `version` 1; `kinds`, a list of objects, each with the
    `targets` that it describes: the `shape` of their base parameter, and where they are not the usual ones `layout`
    (fields of `Layout`), `scale`, `settings` of the family, and `shared`, the keys of shared tensors by slot; and
    `parameters`, the names of base parameters that are not `<target>.weight`. The slots tell the family.
    """

    name: ClassVar[str] = "loratools"

    described: Mapping[str, Described]
    keys: Mapping[str, Mapping[str, str]]
    extras: tuple[str, ...]
    parameters: Mapping[str, str]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return UPDATES_KEY in header.metadata

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        try:
            described, parameters = _read(header.metadata[UPDATES_KEY])
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            raise InputError(f"{header.path}: {UPDATES_KEY} in its metadata is broken: {error}") from None
        keys: dict[str, dict[str, str]] = {}
        extras = []
        for key in header.specs:
            target, _, slot = key.rpartition(".")
            if target in described and not key.startswith(SHARED):
                keys.setdefault(target, {})[slot] = key
            else:
                extras.append(key)
        for target, description in described.items():
            if target not in keys:
                raise InputError(f"{header.path}: {target}: has no tensors in the file")
            if lost := [key for key in description.shared.values() if key not in header.specs]:
                raise InputError(f"{header.path}: {target}: the tensor {lost[0]!r} is not in the file")
        warnings = () if hints.alpha is None else ("the alpha given is ignored: this dialect states its scales",)
        return cls(described, keys, tuple(extras), parameters, {}, warnings)

    @classmethod
    def of(
        cls, described: Mapping[str, Described], slots: Mapping[str, tuple[str, ...]], parameters: Mapping[str, str]
    ) -> Self:
        """The dialect of a new file; AdapterError for a target whose name it cannot have."""
        if bad := [target for target in described if target.startswith(SHARED)]:
            raise AdapterError(f"{bad[0]}: no target can be named so in the dialect {cls.name}")
        keys = {target: {slot: f"{target}.{slot}" for slot in slots[target]} for target in described}
        named = {target: name for target, name in parameters.items() if name != f"{target}.weight"}
        shared = dict.fromkeys(key for d in described.values() for key in d.shared.values())
        return cls(described, keys, tuple(shared), named, {}, ())

    def place(self, target: str) -> Placement | None:
        head, _, rest = target.partition(".")
        return lone("loratools names", head, rest) if head in COMPONENTS and rest else lone("names", "", target)

    def references(self, target: str) -> Mapping[str, str]:
        return self.described[target].shared

    def settings(self, target: str) -> Mapping[str, Any]:
        return self.described[target].settings

    def as_lora(self, parts: Mapping[str, Part], extras: tuple[str, ...]) -> Format:
        return replace(Peft.compose(parts, Order()), extras=extras)

    def spell(self, target: str, slot: str) -> str:
        return f"{target}.{slot}"

    def layout(self, target: str) -> Layout:
        return self.described[target].layout

    def scale_key(self, target: str) -> str | None:
        return None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return self.described[target].scale

    def writable_scale(self, target: str, rank: int, scale: float, mode: ScaleMode) -> float:
        return 1.0 if mode == "fold" else scale

    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        scales = {target: w.scale for target, w in written.items()}
        told = {t: replace(d, scale=scales.get(t, d.scale)) for t, d in self.described.items()}
        return Declaration(None, {**metadata, UPDATES_KEY: _written(told, self.parameters)})

    def parameter(self, target: str) -> str:
        return self.parameters.get(target, f"{target}.weight")

    @property
    def nested_scaling(self) -> NestedScaling | None:
        return None

    def is_stored_transposed(self, target: str) -> bool:
        return False

    def without_mutation(self) -> Self:
        return self

    def replacements(self) -> Mapping[str, str]:
        return {}


def _written(described: Mapping[str, Described], parameters: Mapping[str, str]) -> str:
    kinds: dict[str, list[str]] = {}
    for target, d in described.items():
        shape = d.layout.shape
        kind: dict[str, Any] = {} if shape is None else {"shape": list(shape)}
        plain = asdict(_PLAIN)
        if layout := {k: v for k, v in asdict(d.layout).items() if k != "shape" and v != plain[k]}:
            kind["layout"] = layout
        if d.scale != 1.0:
            kind["scale"] = d.scale
        kind |= {k: v for k, v in (("settings", dict(d.settings)), ("shared", dict(d.shared))) if v}
        kinds.setdefault(json.dumps(kind, sort_keys=True), []).append(target)
    whole = {"version": VERSION, "kinds": [{**json.loads(kind), "targets": t} for kind, t in kinds.items()]}
    if parameters:
        whole["parameters"] = dict(parameters)
    return json.dumps(whole, sort_keys=True, separators=(",", ":"))


def _read(text: str) -> tuple[dict[str, Described], dict[str, str]]:
    """Described targets and parameter names; ValueError, TypeError or KeyError for anything else."""
    whole = json.loads(text)
    if whole["version"] != VERSION:
        raise ValueError(f"version {whole['version']!r} is not known to this loratools")
    found: dict[str, Described] = {}
    for each in whole["kinds"]:
        kind = _object(each)
        scale = float(kind.get("scale", 1.0))
        if not math.isfinite(scale):
            raise ValueError(f"the scale {scale}")
        described = Described(_layout(kind), scale, _object(kind.get("settings", {})), _names(kind.get("shared", {})))
        for target in kind["targets"]:
            if not isinstance(target, str) or target in found:
                raise ValueError(f"the target {target!r}")
            found[target] = described
    return found, _names(whole.get("parameters", {}))


def _layout(kind: Mapping[str, Any]) -> Layout:
    given = dict(_object(kind.get("layout", {})))
    if unknown := set(given) - {f.name for f in fields(Layout) if f.name != "shape"}:
        raise ValueError(f"the layout has {sorted(unknown)[0]!r}")
    if "blocks" in given:
        given["blocks"] = tuple((int(rows), bool(updated)) for rows, updated in given["blocks"])
    shape = kind.get("shape")
    if shape is not None:
        if not shape or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in shape):
            raise ValueError(f"the shape {shape!r}")
        shape = tuple(shape)
        if math.prod(shape) > _MAX_NUMBERS:
            raise ValueError(f"the shape {shape}, which no weight has")
    for name, value in given.items():
        if name != "blocks" and (type(value) is not type(getattr(_PLAIN, name)) or (name == "experts" and value < 1)):
            raise ValueError(f"{value!r} for {name} of the layout")
    return Layout(**given, shape=shape)


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no object")
    return value


def _names(value: Any) -> dict[str, str]:
    found = _object(value)
    if not all(isinstance(name, str) for name in found.values()):
        raise TypeError("a name that is no text")
    return dict(found)
