"""How near the leading singular vectors of W0 + delta are to those of W0: exactly, or within proven bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loratools._lazy import torch
from loratools.linalg.basis import rotated
from loratools.linalg.cosine_bounds import cosine_bounds
from loratools.linalg.krylov import Leading, leading_triplets
from loratools.operators import Dense, LowRank, Operator, sum_of

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.ops.base_spectra import BaseSpectrum

Method = Literal["auto", "dense", "certified"]
Verdict = Literal["dense", "certified"]

_CLOSE = 1e-3  # of a cosine to a threshold: decided in float64
_DEGENERATE = 1e-3  # relative gap of neighbouring singular values, below which their vectors turn freely
_LOW = 4  # a change whose rank is this many times below the shorter side is worked on by its factors


@dataclass(frozen=True, eq=False)
class Cosines:
    """Of each leading vector of one side: bounds on its largest |cosine| with any of the base, float64 of shape (k,).

    `matched` is that with the vector of the same index.
    """

    least: Tensor
    most: Tensor
    matched: Tensor


@dataclass(frozen=True, eq=False)
class Examined:
    """The first k singular triplets of W0 + delta against all of W0; the two bounds are one number where dense."""

    up: Tensor  # (m, k)
    values: Tensor  # (k,) float64
    down: Tensor  # (k, n)
    left: Cosines
    right: Cosines
    verdict: Verdict


def examine(
    base: BaseSpectrum,
    change: Operator,
    *,
    top_k: int,
    thresholds: Sequence[float],
    method: Method = "auto",
    precise: bool = False,
) -> Examined:
    """The leading vectors of W0 + `change`, with every verdict at `thresholds` decided.

    `certified` decides by bounds and turns to the whole basis of W0 only for what they leave open; `auto` does so for
    large weights whose basis is not at hand. W0 + change itself is never decomposed whole, unless it is tiny. `precise`
    gives the triplets in float64.
    """
    if precise or method == "dense" or (method == "auto" and (base.is_small or base.known_basis() is not None)):
        return _with_basis(base, change, top_k, thresholds, precise=precise)
    found = _with_bounds(base, change, top_k, thresholds)
    if all(bool(_decided(side, thresholds).all()) for side in (found.left, found.right)):
        return found
    return _with_basis(base, change, top_k, thresholds, precise=False)


def is_degenerate(base: BaseSpectrum, top_k: int) -> bool:
    """Whether two of the leading singular values of W0 are so close that their vectors turn freely."""
    values = base.leading(top_k).s[: top_k + 1]
    gaps = 1 - values[1:] / values[:-1].clamp_min(1e-300)
    return bool((gaps < _DEGENERATE).any())


def _with_basis(
    base: BaseSpectrum, change: Operator, top_k: int, thresholds: Sequence[float], *, precise: bool
) -> Examined:
    for dtype in dict.fromkeys((torch.float64 if precise else base.weight.dtype, torch.float64)):
        found, error = _against_basis(base, change.to(dtype, base.weight.device), top_k)
        margin = max(_CLOSE, error)
        sides = (found.left.most, found.right.most)
        if not any(bool(((side - t).abs() < margin).any()) for side in sides for t in thresholds):
            break
    return found


def _against_basis(base: BaseSpectrum, change: Operator, top_k: int) -> tuple[Examined, float]:
    """By the whole basis in the dtype of `change`; the largest error of a vector, with it."""
    basis = base.basis(change.leaf.dtype)
    p = len(basis.s)
    k = min(top_k, p)
    if isinstance(change, LowRank) and change.rank * _LOW <= p:
        turned = rotated(basis, change)
        found = leading_triplets(turned.core, k, proven=False)
        left, right = found.u[:, :k], found.vt[:k].T
        up, down = turned.left(left), turned.right(right).T
        left, right = left[:p].T, right[:p].T
    else:
        whole = sum_of([Dense(base.weight.to(change.leaf.dtype)), change])
        found = leading_triplets(whole, k, proven=False)
        up, down = found.u[:, :k], found.vt[:k]
        left, right = up.T @ basis.u, down @ basis.vt.T
    errors = found.errors[:k]
    error = float(errors[torch.isfinite(errors)].max()) if bool(torch.isfinite(errors).any()) else 0.0
    cosines = _exact(left), _exact(right)
    return Examined(up, found.s[:k].cpu(), down, *cosines, "dense"), error


def _exact(signed: Tensor) -> Cosines:
    sizes = signed.abs().double().cpu()  # (k, p)
    largest = sizes.amax(1).clamp(max=1.0)
    return Cosines(largest, largest, sizes.diagonal().clamp(max=1.0))


def _with_bounds(base: BaseSpectrum, change: Operator, top_k: int, thresholds: Sequence[float]) -> Examined:
    """By the leading triplets of W0 where a vector is like one of them, by bounds on all cosines where it is not."""
    k = min(top_k, *change.shape)
    known = base.leading(k)
    whole = sum_of([Dense(base.weight), change.to(base.weight.dtype, base.weight.device)])
    found = leading_triplets(whole, k)
    up, down = found.u[:, :k], found.vt[:k]
    errors = found.errors[:k]
    left = _bounded(base, known, up, errors, thresholds, left=True)
    right = _bounded(base, known, down.T, errors, thresholds, left=False)
    return Examined(up, found.s[:k].cpu(), down, left, right, "certified")


def _bounded(
    base: BaseSpectrum, known: Leading, vectors: Tensor, errors: Tensor, thresholds: Sequence[float], *, left: bool
) -> Cosines:
    mine = known.u if left else known.vt.T
    near = (mine.T @ vectors).abs().double().cpu()  # (K, k)
    slack = known.errors.unsqueeze(1) + errors  # infinite where the one or the other is not known
    sure = (near - slack).clamp_min(0.0)
    beyond = (1 - sure.square().sum(0)).clamp_min(0.0).sqrt()  # with all that are not among the leading ones
    among = torch.where(torch.isfinite(slack), near + slack, beyond).amax(0)
    least, most = sure.amax(0), torch.maximum(among, beyond).clamp(max=1.0)
    matched = near.diagonal().clamp(max=1.0)
    open_ones = ~_decided(Cosines(least, most, matched), thresholds) & torch.isfinite(errors)
    hopeless = near.amax(0) >= max(thresholds)  # no bound on all cosines can be below one of them
    asked = (open_ones & ~hopeless).nonzero().flatten()
    if len(asked):
        limits = [t for t in thresholds if bool(((least[asked] < t) & (most[asked] >= t)).any())]
        bound = _all_cosines(base, vectors[:, asked.to(vectors.device)], known.top, min(limits), left=left)
        most[asked] = torch.minimum(most[asked], bound + errors[asked])
    return Cosines(least, most, matched)


def _all_cosines(base: BaseSpectrum, vectors: Tensor, top: float, enough: float, *, left: bool) -> Tensor:
    """Bounds on the largest |cosine| of each column with any singular vector of W0; 1 where there is none to be had."""
    matrix = base.weight if left else base.weight.T
    if matrix.shape[0] <= matrix.shape[1]:
        return cosine_bounds(Dense(matrix), vectors, top=top, enough=enough)
    factor = base.square_factor(left=left)
    if factor is None:
        return torch.ones(vectors.shape[1], dtype=torch.float64)
    inside = torch.linalg.solve_triangular(factor.T, matrix.T.double() @ vectors.double(), upper=False)
    lengths = inside.norm(dim=0).clamp_min(1e-30)  # what lies outside the column space has no cosine with any of them
    units = (inside / lengths).to(vectors.dtype)
    shortest = float(lengths.max())
    bounds = cosine_bounds(Dense(factor.to(vectors.dtype)), units, top=top, enough=enough / max(shortest, enough))
    return (bounds * lengths.cpu()).clamp(max=1.0)


def _decided(side: Cosines, thresholds: Sequence[float]) -> Tensor:
    """For each vector, whether every threshold lies outside its bounds: at or below the one, or above the other."""
    verdicts = [(side.least >= t) | (side.most < t) for t in thresholds]
    return torch.stack(verdicts).all(0) if verdicts else torch.ones(len(side.least), dtype=torch.bool)


def energy_share(values: Tensor, chosen: Sequence[int]) -> float:
    """The share of the squared `values` that the `chosen` ones hold; 0 where all vanish."""
    squares = values.square()
    total = float(squares.sum())
    return math.fsum(squares[list(chosen)].tolist()) / total if total else 0.0
