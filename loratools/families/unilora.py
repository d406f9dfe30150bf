"""Uni-LoRA: every entry of all factors is one of the few numbers of a single vector (Li et al. 2025; PEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.stated import SEEDS, whole_of
from loratools.families.unilora_fit import fitted_vector
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_THETA = "unilora_theta_d"
_STATED = frozenset(f"unilora_{kind}_{side}" for kind in ("indices", "scales") for side in "AB")
_PLACE = "unilora_place"
_PLACE_BYTES = 16  # two numbers of a target, int64
_RANK = 4  # of a vector that is shorter than factors of rank 1


@dataclass(frozen=True)
class UniLoRAOptions:
    """`rank`: of the factors; `repeats`: how many of their entries share each number of the vector."""

    rank: int = _RANK
    repeats: int = 8


@final
@dataclass(frozen=True, eq=False)
class UniLoRA(Fittable):
    """A = theta[indices] * scales, B likewise, delta = B @ A, for a vector (d,) that all targets share.

    Either indices A (r, n) and B (m, r) with scales of the same shapes; or unilora_place (2,), where the entries of
    this target begin among those of all targets, A before B, and the rank: then the settings `seed`, `length` of the
    vector and `total` number of entries say how the indices are drawn, which is as PEFT draws them.
    """

    family: ClassVar[str] = "unilora"
    required: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = _STATED | {_PLACE}
    references: ClassVar[frozenset[str]] = frozenset({_THETA})
    Options: ClassVar[type[UniLoRAOptions]] = UniLoRAOptions
    guarantee: ClassVar[Guarantee] = "local"
    formula: ClassVar[str] = "B A, entry k of the factors being theta[i_k] / sqrt(uses of it), i drawn from a seed"
    count: ClassVar[str] = "r (m + n) / repeats, in one vector for all targets, and a place"
    paper: ClassVar[str] = "Li et al. 2025, arXiv 2506.00799"

    tensors: Mapping[str, Tensor]
    theta: Tensor
    scale: float
    layout: Layout = Layout()
    seed: int = 0
    total: int = 0

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> UniLoRA:
        tensors, theta = {slot: t for slot, t in parameters.items() if slot != _THETA}, parameters[_THETA]
        if _PLACE in tensors:
            if theta.ndim != 1 or whole_of(settings, "length", 1) != len(theta):
                raise AdapterError(f"{_THETA} {tuple(theta.shape)} is not the vector that its settings tell of")
            seed, total = whole_of(settings, "seed", most=SEEDS[1]), whole_of(settings, "total", 1)
            return cls(tensors, theta, scale, layout, seed, total)
        for side in "AB":
            indices = tensors[f"unilora_indices_{side}"].long()
            if theta.ndim != 1 or int(indices.min()) < 0 or int(indices.max()) >= len(theta):
                raise AdapterError(f"unilora_indices_{side} names numbers that {_THETA} {tuple(theta.shape)} lacks")
        return cls(tensors, theta, scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        if _PLACE in specs:
            alone = len(specs) == 1 and specs[_PLACE].shape == (2,) and specs[_PLACE].dtype == "I64"
            return None if alone else f"{_PLACE} is not two numbers in place of indices"
        if missing := sorted(_STATED - set(specs)):
            return f"{', '.join(missing)} missing"
        a, b = specs["unilora_indices_A"].shape, specs["unilora_indices_B"].shape
        if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b or a[0] != b[1]:
            return f"indices A {a} and B {b} do not chain"
        for side, shape in (("A", a), ("B", b)):
            if (scales := specs[f"unilora_scales_{side}"].shape) != shape:
                return f"the scales {scales} are not one for each index {shape} of {side}"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return 0 if _PLACE in specs else specs["unilora_indices_A"].shape[0]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...] | None:
        if _PLACE in specs:
            return layout.shape
        shape = (specs["unilora_indices_B"].shape[0], specs["unilora_indices_A"].shape[1])
        return shape[::-1] if layout.transposed else shape

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def shared_tensors(self) -> dict[str, Tensor]:
        return {_THETA: self.theta}

    def stated_settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "length": len(self.theta), "total": self.total} if _PLACE in self.tensors else {}

    def operator(self, base: Tensor | None = None) -> Operator:
        if _PLACE in self.tensors:
            return self._drawn(*base_size("Uni-LoRA", base, self.layout))
        a, b = (
            self.theta.double()[self.tensors[f"unilora_indices_{side}"].long()]
            * self.tensors[f"unilora_scales_{side}"].double()
            for side in "AB"
        )
        return LowRank(b, a, self.scale)

    def _drawn(self, m: int, n: int) -> LowRank:
        start, rank = self.tensors[_PLACE].tolist()
        if start < 0 or rank < 1 or start + rank * (m + n) > self.total:
            raise AdapterError(f"{_PLACE} names entries that its {self.total} do not have; is it the right base?")
        indices, scales = drawn(self.total, len(self.theta), self.seed)
        mine = indices[start : start + rank * (m + n)]
        entries = self.theta.double()[mine] * scales[mine]
        return LowRank(entries[rank * n :].reshape(m, rank), entries[: rank * n].reshape(rank, n), self.scale)

    @classmethod
    def encode(cls, source: Source, options: UniLoRAOptions) -> UniLoRA:
        """As for several targets, with a vector of this one's own."""
        return cls.encode_together({"": source}, options)[""]

    @classmethod
    def encode_together(cls, sources: Mapping[str, Source], options: UniLoRAOptions) -> dict[str, UniLoRA]:
        """One vector for all targets, by L-BFGS on the factors' own squared error: r n m for dense deltas a step."""
        if options.rank < 1 or options.repeats < 1:
            raise UsageError(f"unilora: rank {options.rank} and repeats {options.repeats} have to be 1 or more")
        first = next(iter(sources.values()))
        total = options.rank * sum(sum(source.shape) for source in sources.values())
        length = max(1, total // options.repeats)
        indices, scales = drawn(total, length, first.seed)
        theta = fitted_vector([s.delta for s in sources.values()], options.rank, indices, scales, first.seed)
        theta = cast_to(theta, first.stored)
        found, start = {}, 0
        for target, source in sources.items():
            place = torch.tensor([start, options.rank])
            found[target] = cls({_PLACE: place}, theta, 1.0, source.layout, first.seed, total)
            start += options.rank * sum(source.shape)
        return found

    @classmethod
    def within(cls, source: Source, nbytes: int) -> UniLoRAOptions | None:
        return _richest([source], nbytes)

    @classmethod
    def size(cls, source: Source, options: UniLoRAOptions) -> int:
        """Of the place alone: the vector is for all targets."""
        return _PLACE_BYTES

    @classmethod
    def within_together(cls, sources: Mapping[str, Source], nbytes: int) -> dict[str, UniLoRAOptions]:
        """One vector for all, and one rank."""
        options = _richest(list(sources.values()), nbytes)
        if options is None:
            raise UsageError(f"a budget of {nbytes} bytes is too small for {cls.family}, with two integers per target")
        return dict.fromkeys(sources, options)

    @classmethod
    def expected_energy(cls, source: Source, options: UniLoRAOptions) -> float:
        m, n = source.shape
        return min(1.0, options.rank * (m + n) / options.repeats / (m * n))


def _richest(sources: list[Source], nbytes: int) -> UniLoRAOptions | None:
    """Whole factors where there is room for these, else the longest vector with the usual rank."""
    sides = sum(sum(source.shape) for source in sources)
    numbers = (nbytes - _PLACE_BYTES * len(sources)) // sources[0].stored.itemsize
    if numbers < 1:
        return None
    if numbers >= sides:
        return UniLoRAOptions(min(numbers // sides, max(min(source.shape) for source in sources)), 1)
    return UniLoRAOptions(_RANK, -(-_RANK * sides // numbers))


@lru_cache(maxsize=2)  # all targets share it
def drawn(total: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(index into the vector of each of all entries (total,), scale of each number of the vector (length,) float64).

    Every number is used as often as the others, or once more: numpy's generator, in the order in which PEFT asks it.
    """
    import numpy as np  # takes a tenth of a second

    generator = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), total // length)
    if total % length:
        indices = np.concatenate([indices, generator.choice(length, size=total % length, replace=False)])
    generator.shuffle(indices)
    counts = torch.from_numpy(np.bincount(indices, minlength=length))
    # as PEFT has them, in single precision
    return torch.from_numpy(indices), torch.where(counts > 0, counts.float().rsqrt(), 0.0).double()
