"""What an adapter takes of a server's memory, from the shapes of its targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from loratools.errors import UsageError
from loratools.hub.population import Shapes, requirement_text
from loratools.ops.check import server_named
from loratools.ops.servers import SLORA_MODULES, missing_projections, not_square, outside_attention

PLANNED: Final = ("slora", "vllm")
_MOST: Final = 1 << 62  # that sums of sizes can be compared with
_BYTES: Final = 2  # of a number of the pool, and of lora_dtype as the models have it
OTHER_MODEL: Final = "its layers or shapes are not those of most adapters of this base"


@dataclass(frozen=True)
class Footprint:
    """The memory of one server with one base model.

    An adapter of rank r takes `units` * r of what `capacity` counts, each of `unit_bytes`: for S-LoRA cells, of a
    vector of hidden numbers for each layer in both buffers, which a token of the cache takes one of; for vLLM bytes of
    slots. `facts` are what that follows from.
    """

    server: str
    units: int
    unit_bytes: int
    facts: Mapping[str, Any]

    @property
    def pads(self) -> bool:
        """Whether memory is taken by the rank of the bucket, and not by that of the adapter."""
        return self.server == "vllm"

    @property
    def bytes_per_rank(self) -> int:
        """Bytes of memory for each rank of an adapter."""
        return self.units * self.unit_bytes

    def capacity(self, memory: int, reserve_tokens: int) -> int:
        """What `memory` bytes hold, after the tokens that are kept free; UsageError where nothing is left."""
        left = memory // self.unit_bytes - reserve_tokens
        if left < 1:
            raise UsageError(f"--memory {memory} bytes hold {memory // self.unit_bytes} cells, all of them reserved")
        return min(left, _MOST)


def unfit_shapes(server: str, shapes: Shapes) -> str | None:
    """Why `server` cannot serve targets of these shapes, in the words of its requirements; None where it can."""
    if server != "slora":
        return None
    targets = [target for target, _, _ in shapes]
    broken = {
        "attention-only": outside_attention(targets),
        "square": not_square({target: (rows, columns) for target, rows, columns in shapes}),
        "all-projections": missing_projections(targets),
    }
    for name, offenders in broken.items():
        if next(iter(offenders), None) is not None:
            return requirement_text(server_named(server), name)
    return None


def footprint(server: str, signatures: Iterable[Shapes]) -> tuple[Footprint, frozenset[Shapes]]:
    """The memory for adapters of these shapes, and those shapes that are of another model than the first ones.

    The most frequent come first. vLLM sets a slot aside for every module that any adapter may have; counted are those
    that some adapter has.
    """
    return _slots(signatures) if server == "vllm" else _pool(signatures)


def _pool(signatures: Iterable[Shapes]) -> tuple[Footprint, frozenset[Shapes]]:
    sides = {shapes: (len(shapes) // len(SLORA_MODULES), shapes[0][1]) for shapes in signatures}
    layers, hidden = next(iter(sides.values()))
    facts = {"layers": layers, "hidden": hidden, "cells_per_rank": 4, "bytes_per_number": _BYTES}
    made = Footprint("slora", 4, 2 * layers * hidden * _BYTES, facts)
    return made, frozenset(shapes for shapes, found in sides.items() if found != (layers, hidden))


def _slots(signatures: Iterable[Shapes]) -> tuple[Footprint, frozenset[Shapes]]:
    sides: dict[str, tuple[int, int]] = {}
    others = set()
    for shapes in signatures:
        if any(sides.get(target, (rows, columns)) != (rows, columns) for target, rows, columns in shapes):
            others.add(shapes)
        else:
            sides.update((target, (rows, columns)) for target, rows, columns in shapes)
    numbers = sum(rows + columns for rows, columns in sides.values())
    facts = {"targets": len(sides), "numbers_per_rank": numbers, "bytes_per_number": _BYTES}
    return Footprint("vllm", numbers * _BYTES, 1, facts), frozenset(others)


def stored_numbers(shapes: Shapes) -> int:
    """Numbers of the factors of an adapter for each of its ranks."""
    return sum(rows + columns for _, rows, columns in shapes)
