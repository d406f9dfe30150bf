"""VeRA: delta = diag(b) @ B[:m] @ diag(d) @ A[:, :n], A and B random and shared (Kopiczko et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.random_projections import Projections, check_vectors, scaled
from loratools.linalg.diagonal import solved
from loratools.linalg.inner import frobenius
from loratools.linalg.rsvd import randomized_svd
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_SHARED = ("vera_A", "vera_B")
_SWEEPS = 200  # at most
_TRIED = 5  # sweeps from every start, before the best goes on
_STILL = 1e-3  # of what is captured, and of what is not: a sweep that gains less is the last


@dataclass(frozen=True)
class VeRAOptions:
    """`rank`: of the projections, which all targets share."""

    rank: int = 256


@final
@dataclass(frozen=True, eq=False)
class VeRA(Fittable):
    """lambda_b (m,) and lambda_d (r,); of A (r, widest input) and B (widest output, r), each target takes what fits its
    base weight, so that its shape is needed. Projections that were not saved are drawn from their seed."""

    family: ClassVar[str] = "vera"
    required: ClassVar[frozenset[str]] = frozenset({"vera_lambda_b", "vera_lambda_d"})
    references: ClassVar[frozenset[str]] = frozenset(_SHARED)
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True
    Options: ClassVar[type[VeRAOptions]] = VeRAOptions
    guarantee: ClassVar[Guarantee] = "local"
    formula: ClassVar[str] = "diag(b) B diag(d) A, with B and A drawn from a seed"
    count: ClassVar[str] = "m + r"
    paper: ClassVar[str] = "Kopiczko et al. 2024, arXiv 2310.11454"

    lambda_b: Tensor
    lambda_d: Tensor
    projections: Projections
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> VeRA:
        b, d = parameters["vera_lambda_b"], parameters["vera_lambda_d"]
        return cls(b, d, Projections.of(parameters, _SHARED, len(d), len(d), settings), scale, layout)

    @classmethod
    def redrawn(cls, settings: Settings) -> frozenset[str]:
        return cls.references if "seed" in settings else frozenset()

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        return check_vectors(specs)

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["vera_lambda_d"].shape[0]

    def parameters(self) -> dict[str, Tensor]:
        return {"vera_lambda_b": self.lambda_b, "vera_lambda_d": self.lambda_d}

    def shared_tensors(self) -> dict[str, Tensor]:
        return dict(zip(_SHARED, self.projections.stored or (), strict=False))

    def stated_settings(self) -> dict[str, Any]:
        return self.projections.settings

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("VeRA", base, self.layout)
        return scaled(
            self.lambda_b,
            self.lambda_d,
            *self.projections.cut(m, n, torch.float32 if base is None else base.dtype),
            self.scale,
        )

    @classmethod
    def encode(cls, source: Source, options: VeRAOptions) -> VeRA:
        """As for several targets, with projections of this one's own size."""
        return cls.encode_together({"": source}, options)[""]

    @classmethod
    def encode_together(cls, sources: Mapping[str, Source], options: VeRAOptions) -> dict[str, VeRA]:
        """b and d in turn, each by least squares, for projections as wide as the widest target.

        The costs of a sweep are r^2 (m + r), after r n (m + r) once, or r (m + n + r) times its rank for a delta of
        factors.
        """
        if options.rank < 1:
            raise UsageError(f"vera: a rank of {options.rank} leaves no projections")
        largest = (max(s.shape[0] for s in sources.values()), max(s.shape[1] for s in sources.values()))
        found = {}
        for target, source in sources.items():
            drawn = Projections(options.rank, options.rank, None, source.seed, largest, exact=True)
            a, b = drawn.cut(*source.shape, torch.float32)
            outer, inner = alternated(source.delta, b, a, source.seed)
            found[target] = cls(cast_to(outer, source.stored), cast_to(inner, source.stored), drawn, 1.0, source.layout)
        return found

    @classmethod
    def within(cls, source: Source, nbytes: int) -> VeRAOptions | None:
        rank = min(nbytes // source.stored.itemsize - source.shape[0], *source.shape)
        return VeRAOptions(rank) if rank > 0 else None

    @classmethod
    def size(cls, source: Source, options: VeRAOptions) -> int:
        return (source.shape[0] + options.rank) * source.stored.itemsize

    @classmethod
    def within_together(cls, sources: Mapping[str, Source], nbytes: int) -> dict[str, VeRAOptions]:
        """One rank for all, at most the shorter side of the largest matrix."""
        items = sum(source.stored.itemsize for source in sources.values())
        rest = nbytes - sum(source.shape[0] * source.stored.itemsize for source in sources.values())
        rank = min(rest // items, max(min(source.shape) for source in sources.values()))
        if rank < 1:
            raise UsageError(f"a budget of {nbytes} bytes is too small for {cls.family}, which has a number per output")
        return dict.fromkeys(sources, VeRAOptions(rank))

    @classmethod
    def expected_energy(cls, source: Source, options: VeRAOptions) -> float:
        m, n = source.shape
        return min(1.0, (m + options.rank - 1) / (m * n))


def alternated(delta: Operator, b: Tensor, a: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(outer (m,), inner (k,)) for which no small change brings diag(outer) b diag(inner) a nearer to `delta`.

    b (m, k) and a (k, n) float64. Two starts: ones, and the leading singular vector of what the projections see; the
    better end is taken, with both vectors of one root mean square.
    """
    seen, between = delta.matmat(a.T), a @ a.T  # (m, k), (k, k)
    rows = solved(between, seen)  # delta ~ rows @ a
    total = frobenius(delta) ** 2
    if float((rows * seen).sum()) <= 0:
        return b.new_zeros(len(b)), b.new_zeros(len(a))
    hint = randomized_svd(Dense(rows * b), 1, seed=seed)[0][:, 0] * len(b) ** 0.5
    tried = [_descended(seen, between, b, start, total, _TRIED) for start in (torch.ones_like(hint), hint)]
    _, outer, inner = _descended(seen, between, b, max(tried, key=lambda end: end[0])[1], total, _SWEEPS)
    ratio = float(inner.norm() * len(outer) ** 0.5 / (outer.norm() * len(inner) ** 0.5)) ** 0.5
    return (outer * ratio, inner / ratio) if ratio > 0 else (outer, inner)


def _descended(
    seen: Tensor, between: Tensor, b: Tensor, outer: Tensor, total: float, sweeps: int
) -> tuple[float, Tensor, Tensor]:
    """(captured squared norm, outer, inner) from one start."""
    captured, inner = -1.0, b.new_zeros(b.shape[1])
    for _ in range(sweeps):
        inner = solved((b.T @ (b * outer.square().unsqueeze(1))) * between, (seen * b).T @ outer)
        rows = b * inner
        sides, lengths = (rows * seen).sum(1), ((rows @ between) * rows).sum(1)
        outer = torch.where(lengths > 0, sides / lengths, 0.0)
        before, captured = captured, float((outer * sides).sum())
        if captured - before <= _STILL * min(captured, total - captured):
            break
    return captured, outer, inner
