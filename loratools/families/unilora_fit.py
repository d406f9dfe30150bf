"""The one vector whose numbers, spread over the factors of all targets, come nearest to their deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.inner import frobenius
from loratools.linalg.svd import truncate
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor

_STEPS = 20  # of a round, and from every start before the better goes on
_ROUNDS = 20  # at most
_STILL = 1e-3  # of what is captured, and of what is not: a round that gains less is the last


def fitted_vector(deltas: Sequence[Operator], rank: int, indices: Tensor, scales: Tensor, seed: int) -> Tensor:
    """theta (d,) that no small change brings nearer; `indices` of all entries, A (r, n) before B (m, r) of each delta.

    Two starts: the best factors of the deltas, averaged over the entries that share a number, and random numbers.
    Zeros where nothing was found that is nearer than zero.
    """
    whole = math.hypot(*(frobenius(delta) for delta in deltas))
    if whole == 0.0:
        return torch.zeros_like(scales)
    fit = _Fit([delta * (1 / whole) for delta in deltas], rank, indices, scales)
    random = torch.randn(len(scales), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    size = (len(deltas) * len(indices)) ** -0.25  # of entries whose products have about the norm of the deltas
    starts = [fit.pulled_back(fit.best_entries()), random * size / scales.clamp_min(1e-12)]
    tried = [fit.descended(start, 1) for start in starts]
    value, theta = fit.descended(min(tried, key=lambda end: end[0])[1], _ROUNDS)
    return theta * math.sqrt(whole) if value < 0 else torch.zeros_like(theta)


@dataclass(frozen=True, eq=False)
class _Fit:
    """Half the squared error of all deltas as a function of the vector, without what is constant."""

    deltas: list[Operator]
    rank: int
    indices: Tensor
    scales: Tensor

    def pulled_back(self, entries: Tensor) -> Tensor:
        """The transpose of spreading the vector over the entries, whose columns are orthonormal."""
        return torch.zeros_like(self.scales).index_add(0, self.indices, entries * self.scales[self.indices])

    def best_entries(self) -> Tensor:
        """Those of the best factors of each delta, balanced."""
        parts = []
        for delta in self.deltas:
            best = truncate(delta, min(self.rank, *delta.shape)).operator
            assert isinstance(best, LowRank)
            a, b = best.right * abs(best.scale) ** 0.5, best.left * best.scale / abs(best.scale) ** 0.5
            more = self.rank - best.rank
            pads = torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))
            parts += [pad.flatten() for pad in pads]
        return torch.cat(parts)

    def value_and_slope(self, theta: Tensor) -> tuple[float, Tensor]:
        entries = (theta * self.scales)[self.indices]
        slope, values, start = torch.empty_like(entries), [], 0
        for delta in self.deltas:
            m, n = delta.shape
            middle, end = start + self.rank * n, start + self.rank * (m + n)
            a, b = entries[start:middle].reshape(self.rank, n), entries[middle:end].reshape(m, self.rank)
            across, down, seen = a @ a.T, b.T @ b, delta.matmat(a.T)
            values.append(float((across * down).sum()) / 2 - float((b * seen).sum()))
            slope[start:middle] = (down @ a - delta.rmatmat(b).T).flatten()
            slope[middle:end] = (b @ across - seen).flatten()
            start = end
        return math.fsum(values), self.pulled_back(slope)

    def descended(self, start: Tensor, rounds: int) -> tuple[float, Tensor]:
        """(value, vector) after some rounds of L-BFGS; the deltas' norm is 1, so that -1/2 is the least value."""
        theta = torch.nn.Parameter(start.clone())
        search = torch.optim.LBFGS(
            [theta],
            max_iter=_STEPS,
            max_eval=2 * _STEPS,
            history_size=20,
            tolerance_grad=1e-10,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            value, theta.grad = self.value_and_slope(theta.detach())
            return value

        captured = 0.0
        for _ in range(rounds):
            search.step(closure)
            before, captured = captured, -2 * self.value_and_slope(theta.detach())[0]
            if captured - before <= _STILL * min(captured, 1 - captured):
                break
        return -captured / 2, theta.detach()
