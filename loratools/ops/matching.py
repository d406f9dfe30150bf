"""Which targets of several adapters are the same module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.formats.modules import WHOLE, Module, Rows

if TYPE_CHECKING:
    from loratools.adapter import Adapter


def matched(adapters: Sequence[Adapter]) -> list[tuple[str | None, ...]]:
    """One row for each module: its target in every adapter, None where that has none; in the order of the adapters.

    Targets match by name, or else by the name with dots flattened, as dialects flatten it.
    """
    rows: list[list[str | None]] = []
    by_name: dict[str, int] = {}
    by_flat: dict[str, int] = {}
    for i, adapter in enumerate(adapters):
        exact = {target: by_name[target] for target in adapter.entries if target in by_name}
        taken = set(exact.values())
        for target in adapter.entries:
            row = exact.get(target, by_flat.get(flattened(target)))
            if row is None or (target not in exact and row in taken):
                row = len(rows)
                rows.append([None] * len(adapters))
            rows[row][i] = target
            taken.add(row)
            by_name.setdefault(target, row)
            by_flat.setdefault(flattened(target), row)
    return [tuple(row) for row in rows]


def flattened(target: str) -> str:
    """The name as kohya spells module paths."""
    return target.replace(".", "_")


_MAIN = ("unet", "transformer")  # components that a lone model's adapter does not name


def modules_changed(adapter: Adapter) -> dict[Module, list[tuple[str, Rows]]]:
    """The modules that an adapter changes, named alike in all dialects, each with the targets and rows that do it.

    Paths are flattened, for some dialects have no dots; a target whose name tells no module is one of its own name. The
    UNet or transformer of an image model goes without its component, as in a file that holds nothing else.
    """
    found: dict[Module, list[tuple[str, Rows]]] = {}
    for target in adapter.entries:
        placement = adapter.format.place(target)
        if placement is None:
            found.setdefault(Module("", flattened(target)), []).append((target, WHOLE))
            continue
        for piece in placement.pieces:
            component = "" if piece.module.component in _MAIN else piece.module.component
            module = Module(component, flattened(piece.module.path))
            found.setdefault(module, []).append((target, piece.rows))
    return found
