"""LDU: delta = P L D U Q, unit triangular factors of which only r (m + n) - r^2 numbers are free and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings
from loratools.families.fitting import Fittable, Guarantee, Source, check_rank
from loratools.families.lora import cast_to
from loratools.linalg.svd import truncate
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_GONE = 1e-14  # of the first pivot: what remains is rounding
_ROOK_STEPS = 32  # at most, in search of an entry that is the largest of its row and of its column


@dataclass(frozen=True)
class LDUOptions:
    """`rank`: of the factors; None for the rank that the delta has."""

    rank: int | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)


@final
@dataclass(frozen=True, eq=False)
class LDU(Fittable):
    """ldu_l (m r - r (r + 1) / 2,), the columns of L below its diagonal of ones, one after the other; ldu_d (r,);
    ldu_u (n r - r (r + 1) / 2,), the rows of U likewise; ldu_rows and ldu_columns (r,), where the pivots lie in the
    delta: other rows and columns follow in their order. No entry of L or U exceeds 1, for pivots are rook pivots.
    """

    family: ClassVar[str] = "ldu"
    required: ClassVar[frozenset[str]] = frozenset({"ldu_l", "ldu_d", "ldu_u", "ldu_rows", "ldu_columns"})
    Options: ClassVar[type[LDUOptions]] = LDUOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "P L D U Q"
    count: ClassVar[str] = "r (m + n) - r^2, and 2 r places"
    paper: ClassVar[str] = "Gaussian elimination; rook pivoting of Neal and Poole 1992"

    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> LDU:
        found = cls(dict(parameters), scale, layout)
        m, n = found._sides
        for slot, size in (("ldu_rows", m), ("ldu_columns", n)):
            places = parameters[slot].long()
            if int(places.min()) < 0 or int(places.max()) >= size or len(places.unique()) != len(places):
                raise AdapterError(f"{slot} names pivots twice, or beyond the {size} that there are")
        return found

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        if any(
            len(spec.shape) != 1 or not spec.numel for slot, spec in specs.items() if slot not in ("ldu_l", "ldu_u")
        ):
            return "its diagonal or its pivots are no vectors"
        rank = specs["ldu_d"].shape[0]
        if any(specs[slot].shape != (rank,) for slot in ("ldu_rows", "ldu_columns")):
            return f"its pivots are not the {rank} of its diagonal"
        for slot in ("ldu_l", "ldu_u"):
            shape = specs[slot].shape
            if len(shape) != 1 or (shape[0] + rank * (rank + 1) // 2) % rank or _side(shape[0], rank) < rank:
                return f"{slot} {shape} is no triangle of {rank} columns"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["ldu_d"].shape[0]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        rank = specs["ldu_d"].shape[0]
        sides = tuple(_side(specs[slot].numel, rank) for slot in ("ldu_l", "ldu_u"))
        return layout.shape or (sides[::-1] if layout.transposed else sides)

    @property
    def _sides(self) -> tuple[int, int]:
        rank = len(self.tensors["ldu_d"])
        return _side(len(self.tensors["ldu_l"]), rank), _side(len(self.tensors["ldu_u"]), rank)

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def operator(self, base: Tensor | None = None) -> Operator:
        diagonal, (m, n) = self.tensors["ldu_d"].double(), self._sides
        left = _unpacked(self.tensors["ldu_l"], m, self.tensors["ldu_rows"]) * diagonal
        return LowRank(left, _unpacked(self.tensors["ldu_u"], n, self.tensors["ldu_columns"]).T, self.scale)

    @classmethod
    def encode(cls, source: Source, options: LDUOptions) -> LDU:
        delta, rank = source.delta, options.rank
        if rank is not None and (not isinstance(delta, LowRank) or rank < delta.rank):
            best = truncate(delta, min(rank, *delta.shape), seed=source.seed).operator
            assert isinstance(best, LowRank)
            delta = best
        if not isinstance(delta, LowRank):
            raise AdapterError("the delta is no product of factors; say of which rank it should become: rank=N")
        left, d, right, rows, columns = eliminated(delta.left.double() * delta.scale, delta.right.double())
        places = torch.int16 if max(delta.shape) < 2**15 else torch.int32
        return cls(
            {
                "ldu_l": cast_to(_packed(left, rows), source.stored),
                "ldu_d": cast_to(d, torch.float32),
                "ldu_u": cast_to(_packed(right.T, columns), source.stored),
                "ldu_rows": rows.to(places),
                "ldu_columns": columns.to(places),
            },
            1.0,
            source.layout,
        )

    @classmethod
    def within(cls, source: Source, nbytes: int) -> LDUOptions | None:
        best = max(
            (rank for rank in range(1, source.rank + 1) if cls.size(source, LDUOptions(rank)) <= nbytes), default=0
        )
        return LDUOptions(best) if best else None

    @classmethod
    def size(cls, source: Source, options: LDUOptions) -> int:
        m, n = source.shape
        rank = min(options.rank or source.rank, source.rank)
        places = 4 + 2 * (2 if max(m, n) < 2**15 else 4)
        return (rank * (m + n) - rank * (rank + 1)) * source.stored.itemsize + rank * places


@dataclass(eq=False)
class _Remainder:
    """What is left of left @ right, never multiplied out: tall @ wide, on the rows and columns that have no pivot."""

    tall: Tensor  # (m, r + steps)
    wide: Tensor  # (r + steps, n)
    rows: Tensor  # (m,) booleans
    columns: Tensor  # (n,)

    def column(self, j: int) -> Tensor:
        return torch.where(self.rows, self.tall @ self.wide[:, j], 0.0)

    def row(self, i: int) -> Tensor:
        return torch.where(self.columns, self.tall[i] @ self.wide, 0.0)

    def rook(self, probe: Tensor) -> tuple[int, int]:
        """An entry that is the largest of its row and of its column, sought from where `probe` sees most."""
        seen = self.wide.T @ (self.tall.T @ (probe * self.rows))
        j = int(torch.where(self.columns, seen, 0.0).abs().argmax())
        i = int(self.column(j).abs().argmax())
        for _ in range(_ROOK_STEPS):
            across = self.row(i).abs()
            better = int(across.argmax())
            if float(across[better]) <= float(across[j]):
                break
            j = better
            down = self.column(j).abs()
            better = int(down.argmax())
            if float(down[better]) <= float(down[i]):
                break
            i = better
        return i, j


def eliminated(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(lower (m, k), pivots (k,), upper (k, n), rows (k,), columns (k,)), lower diag(pivots) upper = left @ right.

    Column j of lower is 1 at rows[j] and 0 at rows[:j]; upper likewise. k is at least 1, and less than the rank where
    rounding alone would be left. Never forms the product: each step sees the rows and columns in which it looks.
    """
    (m, rank), n = left.shape, right.shape[1]
    most = min(m, n, rank)
    lower, upper, pivots = left.new_zeros(m, most), left.new_zeros(most, n), left.new_zeros(most)
    tall = torch.cat([left, torch.zeros_like(lower)], dim=1)
    wide = torch.cat([right, torch.zeros_like(upper)])
    free = torch.ones(m, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    probe = torch.randn(m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places: list[tuple[int, int]] = []
    for k in range(most):
        rest = _Remainder(tall[:, : rank + k], wide[: rank + k], *free)
        i, j = rest.rook(probe)
        column, row = rest.column(j), rest.row(i)
        pivot = float(column[i])
        if k and abs(pivot) <= _GONE * abs(float(pivots[0])):
            break
        places.append((i, j))
        if pivot:
            lower[:, k], upper[k], pivots[k] = column / pivot, row / pivot, pivot
        lower[i, k] = upper[k, j] = 1.0
        tall[:, rank + k], wide[rank + k] = -pivot * lower[:, k], upper[k]
        free[0][i] = free[1][j] = False
        if not pivot:  # a delta of zeros
            break
    k = len(places)
    rows, columns = (torch.tensor(found) for found in zip(*places, strict=True))
    return lower[:, :k], pivots[:k], upper[:k], rows, columns


def _packed(columns: Tensor, pivots: Tensor) -> Tensor:
    """What is not known beforehand of (m, k) columns: below the ones, pivots first, other rows in their order."""
    ordered = columns[_order(pivots, len(columns))]
    return torch.cat([ordered[k + 1 :, k] for k in range(columns.shape[1])])


def _unpacked(values: Tensor, size: int, pivots: Tensor) -> Tensor:
    """The (m, k) columns that `_packed` took, float64."""
    rank = len(pivots)
    ordered = torch.zeros(size, rank, dtype=torch.float64)
    start = 0
    for k in range(rank):
        ordered[k, k] = 1.0
        ordered[k + 1 :, k] = values[start : start + size - k - 1]
        start += size - k - 1
    whole = torch.empty_like(ordered)
    whole[_order(pivots.long(), size)] = ordered
    return whole


def _order(pivots: Tensor, size: int) -> Tensor:
    """The pivots, then all others as they come."""
    others = torch.ones(size, dtype=torch.bool)
    others[pivots] = False
    return torch.cat([pivots, others.nonzero().flatten()])


def _side(stored: int, rank: int) -> int:
    """How many rows the columns have of which so many numbers are stored."""
    return (stored + rank * (rank + 1) // 2) // rank
