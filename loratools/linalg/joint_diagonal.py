"""Shared factors for several operators: delta_t ~ left diag(s_t) right, which is a CP decomposition of their stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from loratools._lazy import torch
from loratools.linalg.diagonal import projected, solved
from loratools.linalg.inner import frobenius
from loratools.linalg.svd import truncate
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor

_SWEEPS = 500  # at most
_TRIED = 5  # sweeps from every start, before the better goes on
_STILL = 1e-4  # of what is captured, and of what is not: a sweep that gains less is the last
_LASSO = 200  # passes over the coefficients


@dataclass(frozen=True, eq=False)
class Joint:
    """left (m, k) with columns and right (k, n) with rows of length 1, and coefficients (t, k), float64."""

    left: Tensor
    right: Tensor
    coefficients: Tensor


def jointly_diagonal(
    deltas: Sequence[Operator], k: int, *, threshold: float = 0.0, seed: int = 0, sweeps: int = _SWEEPS
) -> Joint:
    """Factors that no small change brings nearer to all `deltas` of one shape (m, n), by alternating least squares.

    Starts: the largest singular vectors of all deltas, each with its partner; and the common eigenvectors of two random
    sums of them, which are the factors wherever deltas have such factors. With `threshold`, coefficients are shrunk by
    that share of the largest product of a delta with a pair of vectors (an L1 penalty), and those that are left are
    fitted again. Costs a sweep k (m + n) ranks and k^2 (m + n): no delta of factors is multiplied out.
    """
    best = [truncate(delta, min(k, *delta.shape), seed=seed).operator for delta in deltas]
    lows = [low for low in best if isinstance(low, LowRank)]
    total = sum(frobenius(delta) ** 2 for delta in deltas)
    stack = _Stack(deltas)
    starts = [_strongest(lows, k), _common(lows, k, seed)]
    tried = [_alternated(stack, start, total, _TRIED) for start in starts]
    captured, found = _alternated(stack, max(tried, key=lambda end: end[0])[1], total, sweeps)
    if threshold > 0 and captured > 0:
        found = _sparse(stack, found, threshold)
    return found


@final
class _Stack:
    """Several deltas of one shape; the factors of those that have some lie side by side, so that one product sees all.

    A delta of another structure is seen through its own products.
    """

    def __init__(self, deltas: Sequence[Operator]) -> None:
        lows = [(i, delta) for i, delta in enumerate(deltas) if isinstance(delta, LowRank)]
        (m, n), kind = deltas[0].shape, torch.float64
        self._count = len(deltas)
        self._left = torch.cat([torch.empty(m, 0, dtype=kind), *(low.left.to(kind) * low.scale for _, low in lows)], 1)
        self._right = torch.cat([torch.empty(0, n, dtype=kind), *(low.right.to(kind) for _, low in lows)])
        self._owner = torch.tensor([i for i, low in lows for _ in range(low.rank)], dtype=torch.int64)
        self._others = [(i, delta) for i, delta in enumerate(deltas) if not isinstance(delta, LowRank)]

    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        """diag(left^T delta_i right^T) for every delta, (t, k)."""
        both = (self._left.T @ left) * (self._right @ right.T)
        found = both.new_zeros(self._count, left.shape[1]).index_add_(0, self._owner, both)
        for i, delta in self._others:
            found[i] = projected(delta, left, right)
        return found

    def matmat(self, right: Tensor, s: Tensor) -> Tensor:
        """The sum of delta_i right^T diag(s_i), (m, k)."""
        seen = self._left @ ((self._right @ right.T) * s[self._owner])
        for i, delta in self._others:
            seen = seen + delta.matmat(right.T) * s[i]
        return seen

    def rmatmat(self, left: Tensor, s: Tensor) -> Tensor:
        """The sum of delta_i^T left diag(s_i), (n, k)."""
        seen = self._right.T @ ((self._left.T @ left) * s[self._owner])
        for i, delta in self._others:
            seen = seen + delta.rmatmat(left) * s[i]
        return seen


def _pad(matrix: Tensor, rows: int, seed: int) -> Tensor:
    """Random rows below those that there are."""
    draw = torch.Generator().manual_seed(seed)
    more = torch.randn(max(rows - len(matrix), 0), matrix.shape[1], generator=draw, dtype=torch.float64)
    return torch.cat([matrix, more])[:rows]


def _strongest(lows: Sequence[LowRank], k: int) -> Joint:
    """Balanced factors have columns and rows as long as the root of their singular value."""
    lefts, rights = torch.cat([low.left.T for low in lows]), torch.cat([low.right for low in lows])
    order = lefts.square().sum(1).argsort(descending=True, stable=True)[:k]
    return _unit(_pad(lefts[order], k, 0).T, _pad(rights[order], k, 1), lefts.new_zeros(len(lows), k))


def _common(lows: Sequence[LowRank], k: int, seed: int) -> Joint:
    """Jennrich: X Y^-1 has the left factors for eigenvectors, where X and Y are sums of deltas with such factors."""
    stacks = (
        torch.cat([low.left * low.right.norm(dim=1) for low in lows], dim=1),
        torch.cat([low.right.T * low.left.norm(dim=0) for low in lows], dim=1),
    )
    sides = [torch.linalg.svd(stack, full_matrices=False)[0][:, :k] for stack in stacks]
    size = min(side.shape[1] for side in sides)
    u, v = (side[:, :size] for side in sides)
    cores = torch.stack([(u.T @ low.left) @ (low.right @ v) for low in lows])  # (t, size, size)
    weights = torch.randn(2, len(lows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x, y = torch.einsum("wt,tij->wij", weights, cores)
    vectors = torch.linalg.eig(x @ torch.linalg.pinv(y)).eigenvectors
    inner = _pad((vectors.real + vectors.imag).T, size, 0).T
    across = (torch.linalg.pinv(inner) @ cores).flatten(0, 1)  # rows of each factor, once for each delta
    rows = torch.stack([torch.linalg.svd(across[i::size], full_matrices=False)[2][0] for i in range(size)])
    left, right = _pad((u @ inner).T, k, 2).T, _pad(rows @ v.T, k, 3)
    return _unit(left, right, left.new_zeros(len(lows), k))


def _unit(left: Tensor, right: Tensor, coefficients: Tensor) -> Joint:
    lengths = left.norm(dim=0), right.norm(dim=1)
    safe = [torch.where(length > 0, length, 1.0) for length in lengths]
    return Joint(left / safe[0], right / safe[1].unsqueeze(1), coefficients * lengths[0] * lengths[1])


def _alternated(deltas: _Stack, start: Joint, total: float, sweeps: int) -> tuple[float, Joint]:
    """(captured squared norm, factors)."""
    left, right, captured = start.left, start.right, 0.0
    s = start.coefficients
    for _ in range(sweeps):
        gram = (left.T @ left) * (right @ right.T)
        s = solved(gram, deltas.projected(left, right))
        left = solved((right @ right.T) * (s.T @ s), deltas.matmat(right, s))
        seen = deltas.rmatmat(left, s)
        rows = solved((left.T @ left) * (s.T @ s), seen)
        before, captured = captured, float((rows * seen).sum())
        unit = _unit(left, rows.T, s)
        left, right, s = unit.left, unit.right, unit.coefficients
        if captured - before <= _STILL * min(captured, total - captured):
            break
    return captured, Joint(left, right, s)


def _sparse(deltas: _Stack, found: Joint, threshold: float) -> Joint:
    """Coefficients of the lasso, those that are not zero fitted again without the penalty."""
    gram = (found.left.T @ found.left) * (found.right @ found.right.T)
    sides = deltas.projected(found.left, found.right)
    return replace(found, coefficients=shrunk(gram, sides, found.coefficients, threshold * float(sides.abs().max())))


def shrunk(gram: Tensor, sides: Tensor, start: Tensor, penalty: float, *, passes: int = _LASSO) -> Tensor:
    """Coefficients (t, k) of the lasso for the normal equations gram s = side, those left fitted again without it."""
    s = start.clone()
    for _ in range(passes):
        before = s.clone()
        for j in range(s.shape[1]):
            rest = sides[:, j] - s @ gram[j] + s[:, j] * gram[j, j]
            s[:, j] = rest.sign() * (rest.abs() - penalty).clamp_min(0) / gram[j, j]
        if float((s - before).norm()) <= 1e-9 * float(s.norm()):
            break
    for t, row in enumerate(s):
        kept = row.nonzero().flatten()
        if len(kept):
            s[t, kept] = solved(gram[kept][:, kept], sides[t, kept])
    return s
