"""The closed set of linear maps that families lower to, and on which every operation is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from loratools._lazy import torch
from loratools.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# A dense form above this many elements (1 GiB in float32) is refused rather than made by accident.
MAX_DENSE_ELEMENTS = 2**28


class Operator(ABC):
    """A linear map of shape (m, n), known by its structure; immutable."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    @abstractmethod
    def T(self) -> Operator:  # noqa: N802 -- the name that torch and numpy use
        """The transpose, of the same structure."""

    @property
    @abstractmethod
    def leaf(self) -> Tensor:
        """One of its tensors, for their dtype and device."""

    @abstractmethod
    def matmat(self, x: Tensor) -> Tensor:
        """self @ x, for x of shape (n, c)."""

    @abstractmethod
    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Operator:
        """The same map with its tensors cast to `dtype` and moved to `device`."""

    @abstractmethod
    def __mul__(self, factor: float) -> Operator:
        """The map scaled by a number."""

    @abstractmethod
    def _dense(self) -> Tensor: ...

    def rmatmat(self, x: Tensor) -> Tensor:
        """self.T @ x, for x of shape (m, c)."""
        return self.T.matmat(x)

    def dense(self) -> Tensor:
        """The full (m, n) matrix; raises AdapterError above `MAX_DENSE_ELEMENTS`."""
        m, n = self.shape
        if m * n > MAX_DENSE_ELEMENTS:
            raise AdapterError(
                f"a dense {m} x {n} matrix would hold {m * n:,} numbers; the limit is {MAX_DENSE_ELEMENTS:,}"
            )
        return self._dense()

    def __rmul__(self, factor: float) -> Operator:
        return self * factor

    def __neg__(self) -> Operator:
        return self * -1.0

    def __add__(self, other: Operator) -> Operator:
        return sum_of([self, other])

    def __sub__(self, other: Operator) -> Operator:
        return sum_of([self, -other])


@final
@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """A matrix given by its entries."""

    matrix: Tensor  # (m, n)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.matrix.shape[0], self.matrix.shape[1])

    @property
    def T(self) -> Dense:  # noqa: N802
        return Dense(self.matrix.T)

    @property
    def leaf(self) -> Tensor:
        return self.matrix

    def matmat(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Dense:
        return Dense(self.matrix.to(device=device, dtype=dtype))

    def __mul__(self, factor: float) -> Dense:
        return Dense(self.matrix * factor)

    def _dense(self) -> Tensor:
        return self.matrix


@final
@dataclass(frozen=True, eq=False)
class LowRank(Operator):
    """scale * left @ right, never multiplied out."""

    left: Tensor  # (m, r)
    right: Tensor  # (r, n)
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(f"left {tuple(self.left.shape)} and right {tuple(self.right.shape)} do not chain")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.left.shape[0], self.right.shape[1])

    @property
    def rank(self) -> int:
        """The number of terms; the rank of the matrix may be smaller."""
        return int(self.left.shape[1])

    @property
    def T(self) -> LowRank:  # noqa: N802
        return LowRank(self.right.T, self.left.T, self.scale)

    @property
    def leaf(self) -> Tensor:
        return self.left

    def matmat(self, x: Tensor) -> Tensor:
        return self.left @ (self.right @ x) * self.scale

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> LowRank:
        return LowRank(self.left.to(device=device, dtype=dtype), self.right.to(device=device, dtype=dtype), self.scale)

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.left, self.right, self.scale * factor)

    def _dense(self) -> Tensor:
        return self.left @ self.right * self.scale


@final
@dataclass(frozen=True, eq=False)
class Diagonal(Operator):
    """Numbers on the main diagonal of an (m, n) matrix that is zero elsewhere, and beyond them."""

    values: Tensor  # (p,), p <= min(m, n)
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or len(self.values) > min(self.size):
            raise ValueError(f"numbers of shape {tuple(self.values.shape)} are no diagonal of a {self.size} matrix")

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def T(self) -> Diagonal:  # noqa: N802
        return Diagonal(self.values, (self.size[1], self.size[0]))

    @property
    def leaf(self) -> Tensor:
        return self.values

    def matmat(self, x: Tensor) -> Tensor:
        count = len(self.values)
        out = x.new_zeros(self.size[0], x.shape[1])
        out[:count] = self.values.unsqueeze(1) * x[:count]
        return out

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Diagonal:
        return Diagonal(self.values.to(device=device, dtype=dtype), self.size)

    def __mul__(self, factor: float) -> Diagonal:
        return Diagonal(self.values * factor, self.size)

    def _dense(self) -> Tensor:
        return self.matmat(torch.eye(self.size[1], dtype=self.values.dtype, device=self.values.device))


@final
@dataclass(frozen=True, eq=False)
class Sparse(Operator):
    """Single entries of an (m, n) matrix that is zero elsewhere; made by `scattered` where places may be the same."""

    places: Tensor  # (k,) int64: row * n + column, each once
    values: Tensor  # (k,)
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.places.shape != self.values.shape or self.values.ndim != 1:
            raise ValueError(f"places {tuple(self.places.shape)} and values {tuple(self.values.shape)} do not match")

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def rows(self) -> Tensor:
        """(k,) int64."""
        return self.places // self.size[1]

    @property
    def columns(self) -> Tensor:
        """(k,) int64."""
        return self.places % self.size[1]

    @property
    def T(self) -> Sparse:  # noqa: N802
        return Sparse(self.columns * self.size[0] + self.rows, self.values, (self.size[1], self.size[0]))

    @property
    def leaf(self) -> Tensor:
        return self.values

    def matmat(self, x: Tensor) -> Tensor:
        indices = torch.stack([self.rows, self.columns])
        return torch.sparse_coo_tensor(indices, self.values, self.size, check_invariants=False) @ x

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Sparse:
        return Sparse(self.places.to(device=device), self.values.to(device=device, dtype=dtype), self.size)

    def __mul__(self, factor: float) -> Sparse:
        return Sparse(self.places, self.values * factor, self.size)

    def _dense(self) -> Tensor:
        flat = self.values.new_zeros(self.size[0] * self.size[1])
        return flat.index_copy_(0, self.places, self.values).reshape(self.size)


def scattered(places: Tensor, values: Tensor, size: tuple[int, int]) -> Sparse:
    """The operator that adds `values` at flat `places`, which may come in any order and more than once."""
    places = places.to(torch.int64)
    if bool((places[1:] > places[:-1]).all()):
        return Sparse(places, values, size)
    distinct, at = torch.unique(places, return_inverse=True)
    return Sparse(distinct, values.new_zeros(len(distinct)).index_add_(0, at, values), size)


@final
@dataclass(frozen=True, eq=False)
class BlockDiagonal(Operator):
    """Independent maps side by side: one per expert or per convolution group."""

    blocks: tuple[Operator, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return (sum(b.shape[0] for b in self.blocks), sum(b.shape[1] for b in self.blocks))

    @property
    def T(self) -> BlockDiagonal:  # noqa: N802
        return BlockDiagonal(tuple(b.T for b in self.blocks))

    @property
    def leaf(self) -> Tensor:
        return self.blocks[0].leaf

    def matmat(self, x: Tensor) -> Tensor:
        parts = x.split([b.shape[1] for b in self.blocks])
        return torch.cat([b.matmat(part) for b, part in zip(self.blocks, parts, strict=True)])

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> BlockDiagonal:
        return BlockDiagonal(tuple(b.to(dtype, device) for b in self.blocks))

    def __mul__(self, factor: float) -> BlockDiagonal:
        return BlockDiagonal(tuple(b * factor for b in self.blocks))

    def _dense(self) -> Tensor:
        return torch.block_diag(*(b._dense() for b in self.blocks))


@final
@dataclass(frozen=True, eq=False)
class Kronecker(Operator):
    """scale * left (x) right: every entry of `left` times a copy of `right`."""

    left: Operator  # (a, b)
    right: Operator  # (c, d)
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return (self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1])

    @property
    def T(self) -> Kronecker:  # noqa: N802
        return Kronecker(self.left.T, self.right.T, self.scale)

    @property
    def leaf(self) -> Tensor:
        return self.left.leaf

    def matmat(self, x: Tensor) -> Tensor:
        (_, b), (c, d) = self.left.shape, self.right.shape
        columns = x.shape[1]
        half = self.right.matmat(x.reshape(b, d, columns).permute(1, 0, 2).reshape(d, b * columns))
        whole = self.left.matmat(half.reshape(c, b, columns).permute(1, 0, 2).reshape(b, c * columns))
        return whole.reshape(-1, columns) * self.scale

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Kronecker:
        return Kronecker(self.left.to(dtype, device), self.right.to(dtype, device), self.scale)

    def __mul__(self, factor: float) -> Kronecker:
        return Kronecker(self.left, self.right, self.scale * factor)

    def _dense(self) -> Tensor:
        return torch.kron(self.left._dense().contiguous(), self.right._dense().contiguous()) * self.scale


class Transform(ABC):
    """An isometry of columns that is known by its algorithm: `count` coefficients of columns of `size` numbers.

    Coefficients are at most as many; where they are as many, the map is orthogonal.
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """Numbers of a column."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Coefficients of a column."""

    @abstractmethod
    def analyse(self, x: Tensor) -> Tensor:
        """The (count, c) coefficients of the columns of x (size, c)."""

    @abstractmethod
    def synthesise(self, coefficients: Tensor) -> Tensor:
        """The (size, c) columns of such coefficients: the transpose of `analyse`, and its inverse where orthogonal."""


@final
@dataclass(frozen=True, eq=False)
class Transformed(Operator):
    """A matrix by its coefficients: rows^T inner columns, with a transform of the rows, of the columns, or of both."""

    inner: Operator
    rows: Transform | None  # None: as they are
    columns: Transform | None

    def __post_init__(self) -> None:
        for transform, side in ((self.rows, 0), (self.columns, 1)):
            if transform is not None and transform.count != self.inner.shape[side]:
                raise ValueError(f"{transform.count} coefficients of a {self.inner.shape} matrix, along axis {side}")

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.inner.shape
        return (m if self.rows is None else self.rows.size, n if self.columns is None else self.columns.size)

    @property
    def T(self) -> Transformed:  # noqa: N802
        return Transformed(self.inner.T, self.columns, self.rows)

    @property
    def leaf(self) -> Tensor:
        return self.inner.leaf

    def matmat(self, x: Tensor) -> Tensor:
        out = self.inner.matmat(x if self.columns is None else self.columns.analyse(x))
        return out if self.rows is None else self.rows.synthesise(out)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Transformed:
        return Transformed(self.inner.to(dtype, device), self.rows, self.columns)

    def __mul__(self, factor: float) -> Transformed:
        return Transformed(self.inner * factor, self.rows, self.columns)

    def _dense(self) -> Tensor:
        dense = self.inner._dense()
        dense = dense if self.rows is None else self.rows.synthesise(dense)
        return dense if self.columns is None else self.columns.synthesise(dense.T).T


@final
@dataclass(frozen=True, eq=False)
class Sum(Operator):
    """A sum that no single structure holds; made by `sum_of`, which merges what it can."""

    terms: tuple[Operator, ...]

    def __post_init__(self) -> None:
        if len({t.shape for t in self.terms}) != 1:
            raise ValueError(f"terms of different shapes: {sorted({t.shape for t in self.terms})}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    @property
    def T(self) -> Sum:  # noqa: N802
        return Sum(tuple(t.T for t in self.terms))

    @property
    def leaf(self) -> Tensor:
        return self.terms[0].leaf

    def matmat(self, x: Tensor) -> Tensor:
        return sum((t.matmat(x) for t in self.terms[1:]), start=self.terms[0].matmat(x))

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Sum:
        return Sum(tuple(t.to(dtype, device) for t in self.terms))

    def __mul__(self, factor: float) -> Sum:
        return Sum(tuple(t * factor for t in self.terms))

    def _dense(self) -> Tensor:
        return sum((t._dense() for t in self.terms[1:]), start=self.terms[0]._dense())


def _flat_terms(terms: list[Operator]) -> Iterator[Operator]:
    for term in terms:
        if isinstance(term, Sum):
            yield from term.terms
        else:
            yield term


def sum_of(terms: list[Operator]) -> Operator:
    """The sum, exactly: low-rank terms become one `LowRank`, dense ones one `Dense`, sparse ones one `Sparse`, equal
    blocks one `BlockDiagonal`.

    Raises ValueError where shapes differ.
    """
    flat = list(_flat_terms(terms))
    if len({t.shape for t in flat}) != 1:
        raise ValueError(f"terms of different shapes: {sorted({t.shape for t in flat})}")
    low = [t for t in flat if isinstance(t, LowRank)]
    dense = [t for t in flat if isinstance(t, Dense)]
    sparse = [t for t in flat if isinstance(t, Sparse)]
    rest = [t for t in flat if not isinstance(t, LowRank | Dense | Sparse)]
    merged: list[Operator] = []
    if dense:
        merged.append(Dense(sum((t.matrix for t in dense[1:]), start=dense[0].matrix)))
    if low:
        merged.append(_merge_low_rank(low))
    if sparse:
        merged.append(_merge_sparse(sparse))
    blocks = [t for t in rest if isinstance(t, BlockDiagonal)]
    if len(blocks) > 1 and len({tuple(b.shape for b in t.blocks) for t in blocks}) == 1:
        columns = zip(*(t.blocks for t in blocks), strict=True)
        rest = [t for t in rest if not isinstance(t, BlockDiagonal)]
        rest.append(BlockDiagonal(tuple(sum_of(list(column)) for column in columns)))
    merged += rest
    return merged[0] if len(merged) == 1 else Sum(tuple(merged))


def _merge_low_rank(terms: list[LowRank]) -> LowRank:
    if len(terms) == 1:
        return terms[0]
    # float64, for folding a scale into factors of a few bits would round them
    left = torch.cat([t.left.double() * t.scale for t in terms], dim=1)  # (m, sum of ranks)
    return LowRank(left, torch.cat([t.right.double() for t in terms], dim=0))


def _merge_sparse(terms: list[Sparse]) -> Sparse:
    if len(terms) == 1:
        return terms[0]
    places = torch.cat([t.places for t in terms])
    return scattered(places, torch.cat([t.values.double() for t in terms]), terms[0].size)
