"""S2-LoRA: delta = P diag(s) Q; all targets of one shape share P and Q, and have sparse coefficients of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.linalg.joint_diagonal import jointly_diagonal
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_SHARED = ("s2lora_P", "s2lora_Q")


@dataclass(frozen=True)
class S2LoRAOptions:
    """`rank`: columns of P that targets of one shape share. `threshold`: by which share of the largest product of a
    delta with them coefficients shrink, so that many become zero."""

    rank: int = 64
    threshold: float = 0.0


@final
@dataclass(frozen=True, eq=False)
class S2LoRA(Fittable):
    """s2lora_s, the coefficients, and s2lora_places, which columns of P (m, k) and rows of Q (k, n) they belong to: all
    of them, where it is not there."""

    family: ClassVar[str] = "s2lora"
    required: ClassVar[frozenset[str]] = frozenset({"s2lora_s"})
    optional: ClassVar[frozenset[str]] = frozenset({"s2lora_places"})
    references: ClassVar[frozenset[str]] = frozenset(_SHARED)
    Options: ClassVar[type[S2LoRAOptions]] = S2LoRAOptions
    guarantee: ClassVar[Guarantee] = "local"
    formula: ClassVar[str] = "P diag(s) Q, with P and Q shared by all targets of one shape, s sparse"
    count: ClassVar[str] = "k (m + n) for each shape, and up to k (and as many places) for each target"
    paper: ClassVar[str] = "Liu et al. 2023, arXiv 2309.11756"
    reconstruction: ClassVar[str] = (
        "the paper's summary tells P diag(s) Q and the sparsity; that each shape of matrices shares one P and Q, and "
        "the size of the penalty, are this project's choice, and P and Q are fitted, not trained"
    )

    s: Tensor
    places: Tensor | None
    left: Tensor
    right: Tensor
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> S2LoRA:
        s, places = parameters["s2lora_s"], parameters.get("s2lora_places")
        left, right = (parameters[slot] for slot in _SHARED)
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != len(right):
            raise AdapterError(f"{_SHARED[0]} {tuple(left.shape)} and {_SHARED[1]} {tuple(right.shape)} do not chain")
        if places is None and len(s) != len(right):
            raise AdapterError(f"{len(s)} coefficients are not those of the {len(right)} columns of {_SHARED[0]}")
        if places is not None and not 0 <= int(places.min()) <= int(places.max()) < len(right):
            raise AdapterError(f"s2lora_places names columns that {_SHARED[0]} {tuple(left.shape)} lacks")
        return cls(s, places, left, right, scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        shape = specs["s2lora_s"].shape
        if len(shape) != 1 or not shape[0]:
            return f"s2lora_s {shape} is no vector"
        if "s2lora_places" in specs and specs["s2lora_places"].shape != shape:
            return f"s2lora_places {specs['s2lora_places'].shape} are not one for each of {shape[0]} coefficients"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["s2lora_s"].shape[0]

    def parameters(self) -> dict[str, Tensor]:
        return {"s2lora_s": self.s} | ({} if self.places is None else {"s2lora_places": self.places})

    def shared_tensors(self) -> dict[str, Tensor]:
        return dict(zip(_SHARED, (self.left, self.right), strict=True))

    def operator(self, base: Tensor | None = None) -> Operator:
        chosen = slice(None) if self.places is None else self.places.long()
        return LowRank(self.left.double()[:, chosen] * self.s.double(), self.right.double()[chosen], self.scale)

    @classmethod
    def encode(cls, source: Source, options: S2LoRAOptions) -> S2LoRA:
        """As for several targets, with P and Q of this one's own."""
        return cls.encode_together({"": source}, options)[""]

    @classmethod
    def encode_together(cls, sources: Mapping[str, Source], options: S2LoRAOptions) -> dict[str, S2LoRA]:
        """P, Q and coefficients of each shape in turn, by least squares."""
        if not 1 <= options.rank < 2**15 or not 0 <= options.threshold < 1:
            raise UsageError(
                f"s2lora: rank {options.rank} has to be 1 or more and below 32768, threshold {options.threshold:g} "
                "0 or more and below 1"
            )
        groups: dict[tuple[int, int], dict[str, Source]] = {}
        for target, source in sources.items():
            groups.setdefault(source.shape, {})[target] = source
        found = {}
        for shape, members in groups.items():
            first = next(iter(members.values()))
            rank = min(options.rank, len(members) * min(shape))
            deltas = [source.delta.to(torch.float64) for source in members.values()]
            joint = jointly_diagonal(deltas, rank, threshold=options.threshold, seed=first.seed)
            left, right = cast_to(joint.left, first.stored), cast_to(joint.right, first.stored)
            for (target, source), row in zip(members.items(), joint.coefficients, strict=True):
                places = row.nonzero().flatten()
                places = places if len(places) else torch.zeros(1, dtype=torch.long)
                sparse = options.threshold > 0 and len(places) < rank
                s = cast_to(row[places] if sparse else row, source.stored)
                found[target] = cls(s, places.short() if sparse else None, left, right, 1.0, source.layout)
        return {target: found[target] for target in sources}

    @classmethod
    def within(cls, source: Source, nbytes: int) -> S2LoRAOptions | None:
        return _richest([source], nbytes)

    @classmethod
    def size(cls, source: Source, options: S2LoRAOptions) -> int:
        """Of the coefficients, with a place for each of them where a threshold is to drop some."""
        rank, item = min(options.rank, *source.shape), source.stored.itemsize
        return rank * item if not options.threshold else max(rank * item, (rank - 1) * (item + 2))

    @classmethod
    def within_together(cls, sources: Mapping[str, Source], nbytes: int) -> dict[str, S2LoRAOptions]:
        """One rank for all shapes, and no coefficient zero."""
        options = _richest(list(sources.values()), nbytes)
        if options is None:
            raise UsageError(f"a budget of {nbytes} bytes is too small for {cls.family} of rank 1")
        return dict.fromkeys(sources, options)


def _richest(sources: list[Source], nbytes: int) -> S2LoRAOptions | None:
    counts: dict[tuple[int, int], int] = {}
    for source in sources:
        counts[source.shape] = counts.get(source.shape, 0) + 1
    each = (sum(m + n for m, n in counts) + len(sources)) * sources[0].stored.itemsize
    rank = min(nbytes // each, max(count * min(shape) for shape, count in counts.items()), 2**15 - 1)
    return S2LoRAOptions(rank) if rank else None
