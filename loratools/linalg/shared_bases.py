"""Bases that many deltas of one shape share: delta_i ~ u core_i v^T (Compress then Serve, arXiv 2407.00066).

A fit sees each delta in common coordinates, as left_i (p, r) @ right_i^T (r, q), in batches that can be had again and
again, so that memory does not depend on how many there are. Along orthonormal u and v nothing is lost on the way to
common coordinates: what is captured there is what is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from loratools._lazy import torch
from loratools.linalg.diagonal import solved

if TYPE_CHECKING:
    from torch import Tensor

Batches = Callable[[], "Iterator[tuple[Tensor, Tensor]]"]  # left (b, p, r) and right (b, q, r), float64

_SWEEPS = 12  # at most
_STILL = 1e-4  # of what is captured, and of what is not: a sweep that gains less is the last
_WHOLE = 32  # up to this width all eigenvectors are had in every sweep
_STACKED = 1 << 21  # numbers of cores that are looked at together, for atoms
_ROUNDS = 6  # of assignment to clusters
_POWER = 4  # iterations for the largest components of what a basis leaves


@final
class RunningBasis:
    """Leading left singular vectors of columns that come in batches: append, and cut back to `width` columns.

    Nothing is lost while all columns so far span no more than `width` dimensions.
    """

    def __init__(self, rows: int, width: int) -> None:
        self._width = min(rows, width)
        self._kept = torch.empty(rows, 0, dtype=torch.float64)
        self._waiting: list[Tensor] = []

    def append(self, columns: Tensor) -> None:
        self._waiting.append(columns.double())
        if sum(c.shape[1] for c in self._waiting) >= self._width:
            self._cut()

    def vectors(self) -> Tensor:
        """(rows, at most width) orthonormal, the strongest first."""
        self._cut()
        lengths = self._kept.norm(dim=0)
        live = lengths > 1e-12 * lengths.max() if len(lengths) else lengths > 0
        return self._kept[:, live] / lengths[live]

    def _cut(self) -> None:
        if self._waiting:
            u, s, _ = torch.linalg.svd(torch.cat([self._kept, *self._waiting], dim=1), full_matrices=False)
            self._kept, self._waiting = u[:, : self._width] * s[: self._width], []


@dataclass(frozen=True, eq=False)
class Bases:
    """u (p, c) and v (q, c): orthonormal columns for `joint`, columns of length 1 for `diagonal`."""

    u: Tensor
    v: Tensor


def joint(
    batches: Batches,
    start: Bases,
    *,
    members: Sequence[bool] | None = None,
    sweeps: int = _SWEEPS,
    near: bool = False,
) -> tuple[Bases, list[float]]:
    """Orthonormal u and v that no alternation brings nearer to all `members`, and what each sweep captured.

    Each half of a sweep takes the leading vectors of sum_i delta_i v v^T delta_i^T, or after the first, and from a
    start that is `near` already, some steps of orthogonal iteration towards them: the captured squared norm never
    falls.
    """
    u, v = start.u, start.v
    captured: list[float] = []
    total = sum(float(((x.mT @ x) * (y.mT @ y)).sum()) for x, y in _chosen(batches, members))
    for sweep in range(sweeps):
        u = _leading(_gram((x @ (y.mT @ v) for x, y in _chosen(batches, members)), u), u, exactly=not (sweep or near))
        gram = _gram((y @ (x.mT @ u) for x, y in _chosen(batches, members)), v)
        v = _leading(gram, v, exactly=not (sweep or near))
        captured.append(float((v * (gram @ v)).sum()))
        before = captured[-2] if len(captured) > 1 else 0.0
        if captured[-1] - before <= _STILL * min(captured[-1], total - captured[-1]):
            break
    return Bases(u, v), captured


def _chosen(batches: Batches, members: Sequence[bool] | None) -> Iterator[tuple[Tensor, Tensor]]:
    at = 0
    for x, y in batches():
        if members is not None:
            inside = torch.tensor(members[at : at + len(x)], dtype=torch.bool)
            at += len(x)
            x, y = x[inside], y[inside]
        if len(x):
            yield x, y


def _gram(sides: Iterator[Tensor], like: Tensor) -> Tensor:
    gram = like.new_zeros(len(like), len(like))
    for side in sides:  # (b, p, c)
        flat = side.transpose(0, 1).flatten(1)
        gram += flat @ flat.T
    return gram


def _leading(gram: Tensor, start: Tensor, *, exactly: bool) -> Tensor:
    if exactly or len(gram) <= _WHOLE:
        return torch.linalg.eigh(gram).eigenvectors[:, -start.shape[1] :].flip(1)
    for _ in range(2):
        start = torch.linalg.qr(gram @ (gram @ start))[0]
    return start


def seeded(similar: Callable[[int], Tensor], count: int, groups: int, *, seed: int) -> Tensor:
    """Which of at most `groups` groups each of `count` deltas begins in, (count,) int64.

    As in k-means++ with 1 - cosine^2 for the distance; `similar(i)` are the cosines of delta i with all.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(count, (1,), generator=generator))]
    squares = [similar(chosen[0]).square()]
    while len(chosen) < groups:
        far = (1 - torch.stack(squares).amax(0)).clamp_min(0)
        far[chosen] = 0
        if float(far.sum()) <= 1e-9 * count:
            break
        chosen.append(int(torch.multinomial(far, 1, generator=generator)))
        squares.append(similar(chosen[-1]).square())
    return torch.stack(squares).argmax(0)


def clustered(batches: Batches, where: Tensor, start: Bases, *, sweeps: int) -> tuple[list[Bases], Tensor, Tensor]:
    """Pairs of bases for groups that begin as in `where`, which one serves each delta, and what it captures of it.

    Fit and assignment take turns until nothing changes, and neither loses.
    """
    fits = [start] * (int(where.max()) + 1)
    for turn in range(_ROUNDS):
        for g in range(len(fits)):
            inside = (where == g).tolist()
            if any(inside):
                fits[g] = joint(batches, fits[g], members=inside, sweeps=sweeps, near=turn > 0)[0]
        captured, new = torch.stack([_captured(batches, fit) for fit in fits]).max(0)
        if bool((new == where).all()):
            break
        where = new
    return fits, where, captured


def _captured(batches: Batches, bases: Bases) -> Tensor:
    return torch.cat([cores(x, y, bases).square().sum((1, 2)) for x, y in batches()])


def cores(x: Tensor, y: Tensor, bases: Bases) -> Tensor:
    """u^T delta v (b, c, c) of a batch."""
    return (x.mT @ bases.u).mT @ (y.mT @ bases.v)


def core_squares(x: Tensor, y: Tensor, bases: Bases) -> Tensor:
    """Squares of the singular values of each core of a batch, the largest first, (b, the smaller of r and c)."""
    left, right = x.mT @ bases.u, y.mT @ bases.v  # (b, r, c)
    if left.shape[1] >= left.shape[2]:
        core = left.mT @ right
        return torch.linalg.eigvalsh(core.mT @ core).flip(1).clamp_min(0)
    values, vectors = torch.linalg.eigh(left @ left.mT)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
    return torch.linalg.eigvalsh(root.mT @ (right @ right.mT) @ root).flip(1).clamp_min(0)


def diagonals(x: Tensor, y: Tensor, bases: Bases) -> tuple[Tensor, Tensor]:
    """The best coefficients (b, c) of a batch on u diag(s) v^T, and the squared norm that they capture (b,)."""
    gram = (bases.u.T @ bases.u) * (bases.v.T @ bases.v)
    sides = ((x.mT @ bases.u) * (y.mT @ bases.v)).sum(1)
    s = solved(gram, sides)
    return s, (s * sides).sum(1)


def atoms(batches: Batches, bases: Bases, most: int, count: int) -> Tensor:
    """(k, c, c) orthonormal matrices, k <= most, that hold most of `count` cores: leading vectors of vec(core_i)."""
    c = bases.u.shape[1]
    if count <= c * c and count * c * c <= _STACKED:
        stack = torch.cat([cores(x, y, bases).flatten(1) for x, y in batches()])
        return torch.linalg.svd(stack, full_matrices=False)[2][:most].reshape(-1, c, c)
    gram = bases.u.new_zeros(c * c, c * c)
    for x, y in batches():
        flat = cores(x, y, bases).flatten(1)
        gram += flat.T @ flat
    return torch.linalg.eigh(gram).eigenvectors[:, -most:].flip(1).T.reshape(-1, c, c)


def left_over(x: Tensor, y: Tensor, squares: tuple[Tensor, Tensor], bases: Bases, core: Tensor, count: int) -> Tensor:
    """Squares of the `count` largest singular values of delta - u core v^T, (b, count): no more than the true ones.

    `squares` are the Gram matrices (b, r, r) of the factors that x and y are coordinates of. What sticks out of u and v
    enters through them, so that nothing of the size of a delta is made.
    """
    lefts, rights = _with_outside(x, squares[0], bases.u), _with_outside(y, squares[1], bases.v)
    c, (b, size, _) = bases.u.shape[1], lefts.shape
    whole = lefts @ rights.mT
    whole[:, :c, :c] -= _triangle(bases.u) @ core @ _triangle(bases.v).mT
    count = min(count, size, rights.shape[1])
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, rights.shape[1], count + 2, generator=generator, dtype=torch.float64).expand(b, -1, -1)
    for _ in range(_POWER):
        probe = torch.linalg.qr(whole.mT @ (whole @ probe))[0]
    return torch.linalg.svdvals(whole @ probe).square()[:, :count]


def _triangle(basis: Tensor) -> Tensor:
    return torch.linalg.qr(basis)[1]


def _with_outside(x: Tensor, square: Tensor, basis: Tensor) -> Tensor:
    """Coordinates of factors along an orthonormal basis of u's span, and along the directions that stick out of it."""
    inside = torch.linalg.qr(basis)[0].T @ x
    rest = square - inside.mT @ inside
    values, vectors = torch.linalg.eigh(rest)
    return torch.cat([inside, (vectors * values.clamp_min(0).sqrt().unsqueeze(1)).mT], dim=1)
