"""Where in its model every target of an adapter lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from loratools.errors import AdapterError, UnmappedModuleError, UnsupportedInTargetError
from loratools.formats.layouts import NATIVE_RULES, Model
from loratools.formats.layouts.flat import flatten
from loratools.formats.modules import BIAS, Module, Rows

if TYPE_CHECKING:
    from loratools.adapter import Adapter, Entry
    from loratools.base_weights import BaseWeights


class Asked(Protocol):
    """What of a conversion decides where targets lie."""

    @property
    def base(self) -> BaseWeights | None: ...
    @property
    def component(self) -> str | None: ...
    @property
    def drop(self) -> frozenset[str]: ...


def modules_of(adapter: Adapter, asked: Asked) -> tuple[dict[Module, tuple[str, Rows]], dict[str, str]]:
    """Every module that the adapter changes, with the target that changes it and the rows there; and what is left out.

    UnmappedModuleError names targets whose names tell no module, unless these may be left out.
    """
    found: dict[Module, tuple[str, Rows]] = {}
    lost = []
    dropped: dict[str, str] = {}
    known = _names_in(asked.base, {m.component for m in _pieces(adapter)}) if asked.base else {}
    for target in adapter.entries:
        placement = adapter.format.place(target)
        if placement is None:
            lost.append(target)
            continue
        for piece in placement.pieces:
            module = known.get((piece.module.component, flatten(piece.module.path)), piece.module)
            if asked.component is not None:
                if module.component not in ("", asked.component):
                    dropped[target] = f"of {module.component}, not of {asked.component}"
                    continue
                module = Module(asked.component, module.path)
            if module in found:
                raise AdapterError(
                    f"{target} and {found[module][0]} both change {module}; the file has two names for one module"
                )
            found[module] = (target, piece.rows)
    if lost and "unmapped" not in asked.drop:
        raise UnmappedModuleError(
            f"{len(lost)} targets have names that no model is known to have: {', '.join(lost[:3])}; "
            "pass --drop unmapped to leave them out"
        )
    dropped |= dict.fromkeys(lost, "its name tells no module")
    if not adapter.entries:
        whole = len(adapter.format.replacements())
        raise UnsupportedInTargetError(
            f"nothing to convert: the file holds {whole} whole parameters and no update of one; they have a meaning "
            "with their base alone"
            if whole
            else f"nothing to convert: {next(iter(adapter.unsupported.values()), 'the file holds no update')}"
        )
    if not found:
        raise UnmappedModuleError(
            f"nothing to convert: no target is of the component {asked.component}"
            if asked.component
            else "nothing to convert: no target's name tells its module"
        )
    return found, dropped


def without_biases(
    modules: Mapping[Module, tuple[str, Rows]], dialect: str, drop: frozenset[str]
) -> tuple[dict[Module, tuple[str, Rows]], dict[str, str]]:
    """The modules that are no biases, and the targets that are: UnsupportedInTargetError unless `drop` names these."""
    biased = {module: target for module, (target, _) in modules.items() if module.path.endswith(BIAS)}
    if biased and "bias" not in drop:
        raise UnsupportedInTargetError(
            f"{dialect} has no place for changes of biases, and {len(biased)} targets are that, such as "
            f"{next(iter(biased.values()))}; pass --drop bias to leave them out"
        )
    dropped = dict.fromkeys(biased.values(), "a bias, which the dialect has no place for")
    return {module: found for module, found in modules.items() if module not in biased}, dropped


def model_named(adapter: Adapter) -> Model | None:
    """The model whose authors' names the targets have, where they have any."""
    placements = (adapter.format.place(target) for target in adapter.entries)
    found = {NATIVE_RULES[p.rule] for p in placements if p is not None and p.rule in NATIVE_RULES}
    return found.pop() if len(found) == 1 else None


def _pieces(adapter: Adapter) -> list[Module]:
    placements = (adapter.format.place(target) for target in adapter.entries)
    return [piece.module for placement in placements if placement for piece in placement.pieces]


def _names_in(base: BaseWeights, components: set[str]) -> dict[tuple[str, str], Module]:
    """(component, flattened path) -> the base's own module, where just one flattens to it; for a base of one model."""
    if len(components) != 1:
        return {}
    (component,) = components
    found: dict[tuple[str, str], Module] = {}
    taken = Counter(flatten(name.removesuffix(".weight")) for name in base.source.specs if name.endswith(".weight"))
    for name in base.source.specs:
        path = name.removesuffix(".weight")
        if path != name and taken[flatten(path)] == 1:
            found[component, flatten(path)] = Module(component, path)
    return found


def module_shape(entry: Entry, rows: Rows) -> tuple[int, ...] | None:
    shape = entry.base_shape
    return None if shape is None else (shape[0] * rows.count // rows.units, *shape[1:])
