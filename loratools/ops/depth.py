"""The targets of one model beside those of another of the same names, and of another depth perhaps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.formats.modules import WHOLE

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights

_IN_LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?)(?P<layer>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Origin:
    """A target of the adapter, by its name and its module, and how much of it goes into the new one."""

    target: str
    module: str
    share: float


@dataclass(frozen=True)
class Pairing:
    """A module of the new model, and what of the adapter it is made of."""

    module: str
    origins: tuple[Origin, ...]


def pairings(
    adapter: Adapter, source: BaseWeights, destination: BaseWeights
) -> tuple[tuple[Pairing, ...], dict[str, str]]:
    """Modules of `destination` by the names that those of the adapter have, and the targets that have none: why.

    Where the two have different numbers of layers, first goes to first and last to last, and what falls between two
    layers is shared by its distance from them; a layer that the adapter leaves alone counts as no change. In the order
    of the adapter's targets.
    """
    dropped: dict[str, str] = {}
    modules: dict[str, str] = {}  # module of the source -> target
    for target in adapter.entries:
        placement = adapter.format.place(target)
        if placement is None or len(placement.pieces) != 1 or placement.pieces[0].rows != WHOLE:
            dropped[target] = "its name tells no single module; convert the adapter to peft first"
        else:
            modules[str(placement.pieces[0].module)] = target
    depths: dict[str, tuple[int, int]] = {}
    found: dict[str, dict[str, float]] = {}  # new module -> module -> share
    for module, target in modules.items():
        match = _IN_LAYER.match(module)
        stack = match["stack"] if match else ""
        if match and stack not in depths:
            depths[stack] = depth(source, stack), depth(destination, stack)
        before, after = depths[stack] if match else (1, 1)
        if match and not after:
            dropped[target] = f"the other model has no layers {stack}N"
            continue
        if not match or before == after:
            new = {module: 1.0}
        else:
            shares = shares_of(int(match["layer"]), before, after)
            new = {f"{stack}{layer}.{match['rest']}": share for layer, share in shares.items()}
        there = {name: share for name, share in new.items() if destination.name_of(f"{name}.weight") is not None}
        if not there:
            names = next(iter(new), None)
            why = f"the other model has no {names}" if names else "the other model is shallower: no layer falls near it"
            dropped[target] = why
        for name, share in there.items():
            found.setdefault(name, {})[module] = share
    return (
        tuple(
            Pairing(name, tuple(Origin(modules[m], m, share) for m, share in origins.items()))
            for name, origins in found.items()
        ),
        dropped,
    )


def depth(base: BaseWeights, stack: str) -> int:
    """How many layers the model has under a prefix such as `model.layers.`; 0 for none."""
    layers = set()
    for name in base.source.specs:
        match = _IN_LAYER.match(name)
        if match and (f".{match['stack']}".endswith(f".{stack}") or f".{stack}".endswith(f".{match['stack']}")):
            layers.add(int(match["layer"]))
    return max(layers) + 1 if layers else 0


def shares_of(layer: int, before: int, after: int) -> Mapping[int, float]:
    """The layers of `after` that a layer of `before` goes into, and its share of each: linear interpolation."""
    found = {}
    for new in range(after):
        # new (before - 1) / (after - 1), exactly; a lone layer takes the middle
        whole, rest, over = (
            (*divmod(new * (before - 1), after - 1), after - 1) if after > 1 else (*divmod(before - 1, 2), 2)
        )
        share = 1 - rest / over if layer == whole else rest / over if layer == whole + 1 else 0.0
        if share > 0:
            found[new] = share
    return found
