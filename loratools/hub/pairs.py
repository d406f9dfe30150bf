"""What two or more adapters have in common, exactly: inner products of whole deltas, one module in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.hub.sketches import Deltas
from loratools.linalg.inner import inner

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.operators import Operator
    from loratools.reports.hub_similar import Relation

SAME = 0.01  # relative distance of one delta rounded to 16 or 8 bits, and a little more


@dataclass(frozen=True)
class Shared:
    """Two adapters a and b: inner products of their deltas, and the least cosine of a module that both change.

    A module that one of them leaves as it is has the cosine 0, unless both do; a module of two shapes is two modules.
    """

    own: float  # <a, a>
    others: float  # <b, b>
    product: float  # <a, b>
    least_cosine: float | None  # None where they share no module
    shared: int
    only_in_a: int
    only_in_b: int
    note: str = ""

    @property
    def cosine(self) -> float:
        """Of the whole deltas; 0 where they share no module."""
        return max(-1.0, min(1.0, self.product / math.sqrt(self.own) / math.sqrt(self.others)))

    @property
    def scale(self) -> float:
        """The s for which b is nearest to s a."""
        return self.product / self.own

    def relation(self, threshold: float) -> Relation:
        """What b is of a: `copy`, `scaled copy`, `derivative` at cosines from the threshold on, or `other`."""
        off = math.sqrt(max(0.0, 1.0 - self.cosine**2))  # relative distance of b from s a
        if off <= SAME:
            return "copy" if abs(self.scale - 1) <= SAME else "scaled copy"
        return "derivative" if abs(self.cosine) >= threshold else "other"


def shared(a: Adapter, others: Sequence[Adapter]) -> list[Shared]:
    """`a` beside each of the others; each of its targets is read once.

    AdapterError for what cannot be sketched, and for a delta of zero.
    """
    readers = [Deltas(adapter) for adapter in (a, *others)]
    sums = [_Sum() for _ in others]
    norms = [0.0 for _ in readers]
    for operators in _side_by_side(readers):
        squares = [0.0 if op is None else inner(op, op) for op in operators]
        norms = [norm + square for norm, square in zip(norms, squares, strict=True)]
        for i, each in enumerate(sums, start=1):
            each.add(operators[0], operators[i], squares[0], squares[i])
    if not all(norm > 0 and math.isfinite(norm) for norm in norms):
        raise AdapterError("its delta is zero, or too large for its norm to be a number")
    return [
        Shared(norms[0], norm, s.product, s.least, s.shared, s.only_in_a, s.only_in_b, _note(a, other, readers[0], r))
        for s, norm, other, r in zip(sums, norms[1:], others, readers[1:], strict=True)
    ]


@dataclass
class _Sum:
    product: float = 0.0
    least: float | None = None
    shared: int = 0
    only_in_a: int = 0
    only_in_b: int = 0

    def add(self, a: Operator | None, b: Operator | None, a_square: float, b_square: float) -> None:
        if a is None or b is None:
            self.only_in_a += a is not None
            self.only_in_b += b is not None
            return
        self.shared += 1
        product = inner(a, b)
        self.product += product
        if a_square > 0 and b_square > 0:
            cosine = max(-1.0, min(1.0, product / math.sqrt(a_square) / math.sqrt(b_square)))
        else:
            cosine = 1.0 if a_square == b_square else 0.0
        self.least = cosine if self.least is None else min(self.least, cosine)


@dataclass(frozen=True, eq=False)
class Regression:
    """An adapter as a weighted sum of others: the best weights, and ||adapter - sum|| / ||adapter||.

    `without` is the same error for each of them left out, with the best weights of the rest.
    """

    weights: tuple[float, ...]
    relative_error: float
    without: tuple[float, ...]

    def is_lean(self, factor: float = 2.0) -> bool:
        """Whether each of the others matters: without it, the squared error would be `factor` times larger."""
        return all(e**2 >= factor * max(self.relative_error, 1e-6) ** 2 for e in self.without)


def regress(adapter: Adapter, on: Sequence[Adapter]) -> Regression:
    """The exact least squares of whole deltas."""
    readers = [Deltas(each) for each in (adapter, *on)]
    gram = torch.zeros(len(readers), len(readers), dtype=torch.float64)
    for operators in _side_by_side(readers):
        for i, x in enumerate(operators):
            for j, y in enumerate(operators[: i + 1]):
                if x is not None and y is not None:
                    gram[i, j] += inner(x, y)
    gram = gram + gram.tril(-1).T
    if not bool(torch.isfinite(gram).all()) or not bool((gram.diagonal() > 0).all()):
        raise AdapterError("its delta is zero, or too large for its norm to be a number")
    return least_squares(gram)


def least_squares(gram: Tensor) -> Regression:
    """The first on the rest, from the Gram matrix of all in float64."""
    count = gram.shape[0] - 1
    every = list(range(1, count + 1))
    weights, error = _solved(gram, every)
    without = tuple(_solved(gram, [i for i in every if i != left])[1] for left in every)
    return Regression(weights, error, without)


def _solved(gram: Tensor, columns: list[int]) -> tuple[tuple[float, ...], float]:
    if not columns:
        return (), 1.0
    norms = gram.diagonal().sqrt()
    scaled = gram / norms.unsqueeze(0) / norms.unsqueeze(1)  # for adapters of very different norms
    inside, right = scaled[columns][:, columns], scaled[columns, 0]
    found = torch.linalg.lstsq(inside, right.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    left = 1.0 - 2.0 * float(found @ right) + float(found @ inside @ found)
    return tuple((found * norms[0] / norms[columns]).tolist()), math.sqrt(max(0.0, left))


def _side_by_side(readers: Sequence[Deltas]) -> Iterator[list[Operator | None]]:
    """The deltas of each module, and of each shape that it has, in float64; None where an adapter has no such."""
    modules = dict.fromkeys(module for reader in readers for module in reader.modules)
    for module in modules:
        found = [reader.find(module) for reader in readers]
        for shape in dict.fromkeys(op.shape for op in found if op is not None):
            yield [None if op is None or op.shape != shape else op.to(torch.float64) for op in found]


def _note(a: Adapter, b: Adapter, first: Deltas, second: Deltas) -> str:
    """What else the two hold, that inner products of deltas say nothing of."""
    said = []
    if first.changes_biases or second.changes_biases:
        said.append("changes of biases were not compared")
    if not _same_extras(a, b):
        said.append("other tensors differ")
    return "; ".join(said)


def _same_extras(a: Adapter, b: Adapter) -> bool:
    """Whether tensors that belong to no update are the same, whatever they are called."""
    ours, theirs = ([x.extras[key] for key in x.loose_extras] for x in (a, b))
    if sorted(e.spec.shape for e in ours) != sorted(e.spec.shape for e in theirs):
        return False
    tensors = [(e.spec.shape, e.read()) for e in theirs]
    for extra in ours:
        own = extra.read()
        same = next((i for i, (s, t) in enumerate(tensors) if s == extra.spec.shape and torch.equal(own, t)), None)
        if same is None:
            return False
        del tensors[same]
    return True
