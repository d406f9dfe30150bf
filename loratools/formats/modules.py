"""Where an update belongs, spelt by no dialect: a component, the module's path there, and the rows that it changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

# The components of an image model; a lone model has none.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True, order=True)
class Module:
    """A module by the name that transformers and diffusers give it; `component` is "" for a lone model."""

    component: str
    path: str

    def __str__(self) -> str:
        return f"{self.component}.{self.path}" if self.component else self.path


@dataclass(frozen=True)
class Rows:
    """Some rows of an update's output, in the order in which the module has them.

    `ranges` count in units, of which all rows of the update make `units`: the key part of a fused qkv is
    `Rows(((1, 2),), 3)`. `heads`: the rows of each head are interleaved, as in Meta's own checkpoints and in GGUF,
    where transformers has halves.
    """

    ranges: tuple[tuple[int, int], ...] = ((0, 1),)
    units: int = 1
    heads: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows as they come."""
        return self.ranges == ((0, self.units),) and not self.heads

    @property
    def count(self) -> int:
        """Units taken."""
        return sum(stop - start for start, stop in self.ranges)

    def indices(self, total: int) -> Tensor:
        """The rows, as indices into the `total` rows of the whole update; ValueError where units do not divide them."""
        unit, rest = divmod(total, self.units)
        if rest:
            raise ValueError(f"{total} rows do not come in {self.units} parts")
        found = torch.cat([torch.arange(start * unit, stop * unit) for start, stop in self.ranges])
        if self.heads:
            found = found.reshape(self.heads, -1, 2).transpose(1, 2).reshape(-1)
        return found

    @classmethod
    def part(cls, index: int, weights: Iterable[int]) -> Self:
        """The part at `index` of consecutive parts with these weights."""
        sizes = list(weights)
        start = sum(sizes[:index])
        return cls(((start, start + sizes[index]),), sum(sizes))


WHOLE = Rows()


@dataclass(frozen=True)
class Piece:
    """Rows of one update in a file, and the module that they change."""

    module: Module
    rows: Rows = WHOLE


@dataclass(frozen=True)
class Placement:
    """The modules that one target of a file changes, and the rule that told."""

    rule: str
    pieces: tuple[Piece, ...]


BIAS = ".bias"  # ends the path of what stands for a module's bias, which may have an update of its own


def of_bias(placement: Placement | None) -> Placement | None:
    """Where the bias of a module lies, from where the module does."""
    if placement is None:
        return None
    pieces = tuple(Piece(Module(p.module.component, p.module.path + BIAS), p.rows) for p in placement.pieces)
    return Placement(placement.rule, pieces)


def with_biases(
    modules: Collection[Module], arrange: Callable[[Collection[Module]], Mapping[str, Placement]]
) -> dict[str, Placement]:
    """As `arrange` names modules, for biases too: theirs are the targets of their modules with `.bias`."""
    owners = {m: Module(m.component, m.path.removesuffix(BIAS)) for m in modules if m.path.endswith(BIAS)}
    weights = {m for m in modules if m not in owners}
    named = arrange(tuple(dict.fromkeys(owners.get(m, m) for m in modules)))
    found = {t: p for t, p in named.items() if any(piece.module in weights for piece in p.pieces)}
    biased = set(owners.values())
    for target, placement in named.items():
        if any(piece.module in biased for piece in placement.pieces) and (bias := of_bias(placement)) is not None:
            found[target + BIAS] = bias
    return found


def lone(rule: str, component: str, path: str) -> Placement:
    """A target that changes one whole module."""
    return Placement(rule, (Piece(Module(component, path)),))
