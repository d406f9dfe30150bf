"""Whether adapters may be merged at all, and what becomes of the tensors that belong to no update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from loratools._lazy import torch
from loratools.errors import AdapterError, InputError, UsageError
from loratools.formats.peft import mutated_base
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    from loratools.adapter import Adapter, Extra

ExtrasRule = Literal["equal", "first", "drop"]
_LISTED = 3


def name_of(adapter: Adapter, index: int) -> str:
    """What messages call an adapter."""
    return printable(adapter.origin.path) if adapter.origin else f"adapter {index + 1}"


def check_compatible(adapters: Sequence[Adapter], rows: Sequence[tuple[str | None, ...]]) -> list[str]:
    """What to warn of; AdapterError where the adapters cannot be merged."""
    warnings = []
    configs = [adapter.config or {} for adapter in adapters]
    for i, (adapter, config) in enumerate(zip(adapters, configs, strict=True)):
        where = name_of(adapter, i)
        if not adapter.entries:
            raise InputError(f"{where}: holds no update of a weight, so there is nothing to merge")
        if config.get("alora_invocation_tokens"):
            raise AdapterError(
                f"{where}: an activated LoRA applies only after its invocation tokens; it cannot be merged"
            )
        if i and not any(row[i] is not None and any(t is not None for t in row[:i]) for row in rows):
            if adapters[0].format.flat != adapter.format.flat:
                raise AdapterError(
                    f"{where}: none of its targets is named as in {name_of(adapters[0], 0)}, which is in another "
                    "dialect; convert one of them first"
                )
            warnings.append(f"{where}: shares no target with the adapters before it")
        warnings += [f"{where}: {text}" for text in adapter.warnings]
    inits = [mutated_base(config) for config in configs]
    if len(set(inits)) > 1:
        i = next(i for i, init in enumerate(inits) if init is not None)
        raise AdapterError(
            f"{name_of(adapters[i], i)}: trained with init_lora_weights={inits[i]!r}, so it is relative to another "
            "base than the rest; make a plain LoRA of it with squeeze --initial-adapter first"
        )
    bases = {str(c["base_model_name_or_path"]): 0 for c in configs if c.get("base_model_name_or_path")}
    if len(bases) > 1:
        warnings.append(f"trained on different bases: {', '.join(bases)}; a merge of these seldom makes sense")
    _check_layouts(adapters, rows)
    return warnings


def _check_layouts(adapters: Sequence[Adapter], rows: Sequence[tuple[str | None, ...]]) -> None:
    for row in rows:
        held = [(i, target) for i, target in enumerate(row) if target is not None]
        (first, name), rest = held[0], held[1:]
        ours = adapters[first].entries[name]
        for i, target in rest:
            entry = adapters[i].entries[target]
            both = f"in {name_of(adapters[first], first)} and {name_of(adapters[i], i)}"
            same_dialect = adapters[i].format.name == adapters[first].format.name
            if same_dialect and entry.layout.transposed != ours.layout.transposed:
                raise AdapterError(
                    f"{name}: fan_in_fan_out (or an embedding's layout) differs {both}; these adapt different bases"
                )
            a, b = ours.base_shape, entry.base_shape
            comparable = a is not None and b is not None and entry.layout.transposed == ours.layout.transposed
            if comparable and _squeezed(a) != _squeezed(b):
                raise AdapterError(f"{name}: {a} and {b} {both}; these adapt different bases")


def _squeezed(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return shape[:2] if shape is not None and all(size == 1 for size in shape[2:]) else shape


def merged_extras(adapters: Sequence[Adapter], rule: ExtrasRule) -> tuple[dict[str, Extra], tuple[str, ...]]:
    """The extras that the output carries, and the names of those left out.

    `equal` carries what all adapters hold alike and raises AdapterError for anything else, `first` takes the first
    adapter's, `drop` none. Tensors that updates are made from are neither carried nor missed.
    """
    if rule not in ("equal", "first", "drop"):
        raise UsageError(f"extras {rule!r} are not equal, first or drop")
    held = [_independent(adapter) for adapter in adapters]
    names = list(dict.fromkeys(key for extras in held for key in extras))
    if rule == "drop":
        return {}, tuple(names)
    if rule == "equal" and (differing := [key for key in names if not _is_equal([h.get(key) for h in held])]):
        listed = ", ".join(differing[:_LISTED])
        more = f" and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
        raise AdapterError(
            f"{listed}{more}: no update, and not the same in all adapters, so there is no merge of it; pass "
            "--drop-extras to leave such tensors out, or --first-extras to take those of the first adapter"
        )
    return held[0], tuple(key for key in names if key not in held[0])


def _independent(adapter: Adapter) -> dict[str, Extra]:
    return {key: adapter.extras[key] for key in adapter.loose_extras}


def _is_equal(extras: Sequence[Extra | None]) -> bool:
    first = extras[0]
    if first is None or any(extra is None or extra.spec != first.spec for extra in extras):
        return False
    value = first.read()
    return all(extra is not None and torch.equal(value, extra.read()) for extra in extras[1:])
