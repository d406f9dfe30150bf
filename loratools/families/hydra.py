"""Hydra: delta = scale * (U_p D_p + U_s D_s W), a branch beside the base weight and one behind it (2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_matrix
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.linalg.inner import frobenius
from loratools.linalg.svd import truncate
from loratools.operators import Dense, LowRank, Operator, sum_of

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.storage.base import TensorSpec

_SWEEPS = 10
_GONE = 1e-4  # of the largest singular value: directions of the base that a stored factor could not reach
_OUTSIDE = 1e-8  # of the delta's norm: what does not lie in the row space of the base, but for rounding


@dataclass(frozen=True)
class HydraOptions:
    """`rank`: of the parallel branch; `sequential`: of the other, None for the same. Without a rank both share that of
    the delta, where it is a product of factors.
    """

    rank: int | None = None
    sequential: int | None = None


@final
@dataclass(frozen=True, eq=False)
class Hydra(Fittable):
    """hydra_p_down (r_p, n) and hydra_p_up (m, r_p) read the input, hydra_s_down (r_s, m) and hydra_s_up (m, r_s) the
    base's output, bias included; each of the four may have a bias, and a branch may have a learnt scale of its own in
    place of the one that a config states. A file may lack either branch.

    It is a LoRA of rank r_p + r_s, exactly, and a change of the bias. Where the base has no fewer outputs than inputs
    and full rank, the sequential branch is as free as a parallel one; else it is confined to the base's row space.
    """

    family: ClassVar[str] = "hydra"
    required: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset(
        f"hydra_{branch}_{part}" for branch in "ps" for part in ("down", "up", "down_bias", "up_bias", "scale")
    )
    needs_base: ClassVar[bool] = True
    Options: ClassVar[type[HydraOptions]] = HydraOptions
    guarantee: ClassVar[Guarantee] = "local"
    formula: ClassVar[str] = "U_p D_p + U_s D_s W"
    count: ClassVar[str] = "r_p (m + n) + 2 r_s m"
    paper: ClassVar[str] = "Hydra 2023, arXiv 2309.06922"
    fits_with_base: ClassVar[bool] = True

    tensors: Mapping[str, Tensor]
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> Hydra:
        return cls(dict(parameters), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        if any(not spec.numel for spec in specs.values()):
            return "it holds a tensor without numbers"
        outputs = set()
        for branch in {slot[6] for slot in specs}:
            at = f"hydra_{branch}_"
            if f"{at}down" not in specs or f"{at}up" not in specs:
                return f"the branch {at}* lacks a factor"
            down, up = specs[f"{at}down"].shape, specs[f"{at}up"].shape
            if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
                return f"up {up} and down {down} do not chain"
            outputs |= {up[0]} | ({down[1]} if branch == "s" else set())
            for part, count in (("down_bias", down[0]), ("up_bias", up[0]), ("scale", 1)):
                if f"{at}{part}" in specs and specs[f"{at}{part}"].numel != count:
                    return f"{at}{part} holds {specs[f'{at}{part}'].numel} numbers where {count} are needed"
        return None if len(outputs) == 1 else f"its factors are for {sorted(outputs)} outputs"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return sum(specs[slot].shape[0] for slot in ("hydra_p_down", "hydra_s_down") if slot in specs)

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...] | None:
        if layout.shape is not None or "hydra_p_up" not in specs:
            return layout.shape
        shape = (specs["hydra_p_up"].shape[0], specs["hydra_p_down"].shape[1])
        return shape[::-1] if layout.transposed else shape

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def operator(self, base: Tensor | None = None) -> LowRank:
        parts = [part for part in self.branches(base).values() if part is not None]
        whole = sum_of(list(parts))
        assert isinstance(whole, LowRank)
        return whole

    def branches(self, base: Tensor | None = None) -> dict[str, LowRank | None]:
        """The parallel and the sequential part of the delta, scale included."""
        weight = base_matrix("Hydra", base, self.layout)
        found: dict[str, LowRank | None] = {"parallel": None, "sequential": None}
        for name, branch in (("parallel", "p"), ("sequential", "s")):
            if f"hydra_{branch}_up" not in self.tensors:
                continue
            up, down = (self.tensors[f"hydra_{branch}_{part}"].double() for part in ("up", "down"))
            expected = (len(up), down.shape[1] if branch == "p" else weight.shape[1])
            if tuple(weight.shape) != expected:
                raise AdapterError(
                    f"the base weight is {tuple(weight.shape)} where its {name} branch is for {expected}; is it the "
                    "right base?"
                )
            found[name] = LowRank(up, down if branch == "p" else down @ weight, self._scale(branch))
        return found

    def bias_delta(self, bias: Tensor | None = None) -> Tensor | None:
        changes = []
        for branch in "ps":
            at = f"hydra_{branch}_"
            held = self.tensors
            if f"{at}up" not in held:
                continue
            inner = held[f"{at}down_bias"].double().flatten() if f"{at}down_bias" in held else None
            if branch == "s" and bias is not None:
                through = held[f"{at}down"].double() @ bias.double()
                inner = through if inner is None else inner + through
            parts = [] if inner is None else [held[f"{at}up"].double() @ inner]
            parts += [held[f"{at}up_bias"].double().flatten()] if f"{at}up_bias" in held else []
            changes += [part * self._scale(branch) for part in parts]
        return sum(changes[1:], start=changes[0]).float() if changes else None

    def _scale(self, branch: str) -> float:
        own = self.tensors.get(f"hydra_{branch}_scale")
        return self.scale if own is None else float(own)

    @classmethod
    def encode(cls, source: Source, options: HydraOptions) -> Hydra:
        """Ten sweeps of alternation from two starts: the SVD of the delta, and of what no sequential branch reaches.

        Costs an eigenvalue decomposition of the smaller side of the base; a delta of factors is never multiplied out.
        """
        weight = base_matrix("Hydra", source.base, source.layout)
        (m, n), delta = weight.shape, source.delta
        ranks = _ranks(delta, options)
        if isinstance(delta, LowRank):
            delta = LowRank(delta.left.double() * delta.scale, delta.right.double())
        rows = _RowSpace.of(weight)
        p, s = min(ranks[0], m, n), min(ranks[1], m, n, len(rows.values))
        best, least = (_nothing(m, n, p), _nothing(m, n, s)), frobenius(delta)
        for parallel in _starts(delta, rows, p, source.seed):
            for _ in range(_SWEEPS):
                sequential = rows.nearest(_less(delta, parallel), s, source.seed)
                error = frobenius(_less(_less(delta, parallel), sequential))
                if error < least:
                    best, least = (parallel, sequential), error
                parallel = _nearest(_less(delta, sequential), p, source.seed)
        parallel, sequential = best
        made = {"hydra_p_up": parallel.left, "hydra_p_down": parallel.right}
        if s:
            made |= {"hydra_s_up": sequential.left, "hydra_s_down": rows.before(sequential.right)}
        return cls({slot: cast_to(t, source.stored) for slot, t in made.items()}, 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> HydraOptions | None:
        m, n = source.shape
        count = nbytes // source.stored.itemsize
        both = min(count // (3 * m + n), m, n)
        if both:
            return HydraOptions(both, both)
        return HydraOptions(1, 0) if count >= m + n else None

    @classmethod
    def size(cls, source: Source, options: HydraOptions) -> int:
        m, n = source.shape
        parallel, sequential = (min(rank, m, n) for rank in _ranks(source.delta, options))
        return (parallel * (m + n) + 2 * sequential * m) * source.stored.itemsize


def _ranks(delta: Operator, options: HydraOptions) -> tuple[int, int]:
    rank = options.rank
    if rank is None:
        if not isinstance(delta, LowRank):
            raise AdapterError("the delta is no product of factors; say of which rank the branches should be: rank=N")
        whole = min(delta.rank, *delta.shape)
        rank = whole - whole // 2
        return rank, whole // 2 if options.sequential is None else options.sequential
    sequential = rank if options.sequential is None else options.sequential
    if rank < 1 or sequential < 0:
        raise AdapterError(f"branches of rank {rank} and {sequential} hold nothing")
    return rank, sequential


@dataclass(frozen=True, eq=False)
class _RowSpace:
    """The base weight as u diag(values) basis, without the directions that are too small to be divided by."""

    u: Tensor  # (m, k)
    values: Tensor  # (k,)
    basis: Tensor  # (k, n)

    @classmethod
    def of(cls, weight: Tensor) -> _RowSpace:
        m, n = weight.shape
        squares, vectors = torch.linalg.eigh(weight @ weight.T if m <= n else weight.T @ weight)
        values = squares.clamp(min=0).sqrt()
        kept = values > _GONE * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        if m <= n:
            return cls(vectors, values, (vectors / values).T @ weight)
        return cls(weight @ (vectors / values), values, vectors.T)

    def inside(self, op: Operator) -> Operator:
        """op V, of which op V V^T is the part in the row space."""
        if isinstance(op, LowRank):
            return LowRank(op.left, op.right @ self.basis.T, op.scale)
        return Dense(op.matmat(self.basis.T))

    def nearest(self, op: Operator, rank: int, seed: int) -> LowRank:
        """The matrix of this rank nearest to `op` whose rows lie in the row space."""
        found = _nearest(self.inside(op), rank, seed)
        return LowRank(found.left, found.right @ self.basis)

    def before(self, rows: Tensor) -> Tensor:
        """The D (r, m) with D @ W = rows, which lie in the row space."""
        return (rows @ self.basis.T / self.values) @ self.u.T


def _starts(delta: Operator, rows: _RowSpace, rank: int, seed: int) -> list[LowRank]:
    starts = [_nearest(delta, rank, seed)]
    if len(rows.values) < delta.shape[1]:
        # Rows outside are the parallel branch's alone, and so tell its outputs; those it may then use to the full.
        outside = sum_of([delta, -_within(rows, delta)])
        if frobenius(outside) > _OUTSIDE * frobenius(delta):
            basis = torch.linalg.qr(_nearest(outside, rank, seed).left)[0]
            starts.append(LowRank(basis, delta.T.matmat(basis).T))
    return starts


def _within(rows: _RowSpace, op: Operator) -> Operator:
    if isinstance(op, LowRank):
        return LowRank(op.left, op.right @ rows.basis.T @ rows.basis, op.scale)
    return Dense(op.matmat(rows.basis.T) @ rows.basis)


def _nearest(op: Operator, rank: int, seed: int) -> LowRank:
    m, n = op.shape
    if not rank:
        return _nothing(m, n, 0)
    found = truncate(op, min(rank, m, n), seed=seed).operator
    assert isinstance(found, LowRank)
    return found


def _less(op: Operator, part: LowRank) -> Operator:
    return sum_of([op, -part]) if part.rank else op


def _nothing(m: int, n: int, rank: int) -> LowRank:
    return LowRank(torch.zeros(m, rank, dtype=torch.float64), torch.zeros(rank, n, dtype=torch.float64))
