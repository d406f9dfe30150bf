"""Whether fine-tunes learn the same directions in one layer as in another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.subspace import overlap
from loratools.ops.inspect import depth
from loratools.reports.compare import OverlapMap

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.ops.compare_numbers import Decomposed

# Of every space that is kept for the maps: in float32, 16 * (m + n) numbers for each matrix and fine-tune.
MAX_MAP_RANK = 16


@dataclass(frozen=True, eq=False)
class Spaces:
    """The leading singular vectors of one update, as columns."""

    output: Tensor  # (m, k)
    input: Tensor  # (n, k)


def spaces_of(found: Decomposed) -> Spaces:
    """At most `MAX_MAP_RANK` vectors a side, in float32 on the CPU."""
    rank = min(found.rank, MAX_MAP_RANK)
    # clones: a view would keep all the vectors alive
    sides = (found.up[:, :rank], found.down[:rank].T)
    return Spaces(*(side.to("cpu", torch.float32).clone() for side in sides))


def overlap_maps(
    spaces: Mapping[str, Mapping[str, Spaces]], places: Mapping[str, tuple[str, str]]
) -> Iterator[OverlapMap]:
    """Maps of every pair of fine-tunes, or of the only one with itself, for each type of module in several layers.

    `spaces` is by fine-tune and parameter, `places` gives layer and module of each parameter.
    """
    pairs = list(combinations(spaces, 2)) or [(name, name) for name in spaces]
    modules: dict[str, list[str]] = {}
    for parameter, (_, module) in places.items():
        modules.setdefault(module, []).append(parameter)
    for a, b in pairs:
        for module, parameters in modules.items():
            changed = [p for p in parameters if p in spaces[a] or p in spaces[b]]
            changed.sort(key=lambda p: depth(places[p][0]))
            rows, columns = ([spaces[name].get(p) for p in changed] for name in (a, b))
            if len(changed) < 2 or not any(rows) or not any(columns):
                continue
            names = _labels(changed, places)
            for side in ("output", "input"):
                yield OverlapMap(a, b, module, side, names, _values(rows, columns, is_output=side == "output"))


def _labels(parameters: Sequence[str], places: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    """Their layers; where a layer has several of them, the paths that they lie at."""
    layers = tuple(places[p][0] for p in parameters)
    if len(set(layers)) == len(layers):
        return layers
    return tuple(p.removesuffix(".weight").rpartition(".")[0] or p for p in parameters)


def _values(
    rows: Sequence[Spaces | None], columns: Sequence[Spaces | None], *, is_output: bool
) -> tuple[tuple[float | None, ...], ...]:
    def sides(found: Sequence[Spaces | None]) -> list[Tensor | None]:
        return [None if s is None else s.output if is_output else s.input for s in found]

    return tuple(tuple(_overlap(x, y) for y in sides(columns)) for x in sides(rows))


def _overlap(a: Tensor | None, b: Tensor | None) -> float | None:
    """Of spaces of equal dimension: as many vectors of each as the smaller one has."""
    if a is None or b is None or a.shape[0] != b.shape[0]:
        return None
    rank = min(a.shape[1], b.shape[1])
    return overlap(a[:, :rank], b[:, :rank]) if rank else None
