"""How near the leading singular vectors of W0 + delta are to those of W0: exactly, or within proven bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loratools._lazy import torch
from loratools.linalg.basis import rotated
from loratools.linalg.cosine_bounds import Question, cosine_bounds
from loratools.linalg.krylov import Leading, leading_triplets
from loratools.operators import Dense, LowRank, Operator, sum_of
from loratools.ops.base_spectra import TOLERANCE

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.ops.base_spectra import BaseSpectrum

Verdict = Literal["dense", "certified"]

_CLOSE = 1e-3  # of a cosine to a threshold: decided in float64
_DEGENERATE = 1e-3  # relative gap of neighbouring singular values, below which their vectors turn freely
# What an iteration begins with: leading vectors of W0 beyond those asked for, directions of the change, random ones.
_MORE, _ALONG_CHANGE, _ANYWHERE = 10, 8, 4
_WITHIN = 3e-4  # of a vector of W0 + change; closer calls are made in float64
_TAKEN_OUT = 3e-4  # error of a leading vector of W0 with which it is taken out of a question about the others
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
    """The first k singular triplets of W0 + delta against all of W0; the two bounds are one number where dense.

    `up` (m, k) and `down` (k, n) are there where the vectors themselves were asked for.
    """

    values: Tensor  # (k,) float64
    left: Cosines
    right: Cosines
    verdict: Verdict
    up: Tensor | None = None
    down: Tensor | None = None


def examine(
    base: BaseSpectrum,
    change: Operator,
    *,
    top_k: int,
    thresholds: Sequence[float],
    vectors: bool = False,
) -> Examined:
    """The leading vectors of W0 + `change`, with every verdict at `thresholds` decided.

    W0 + change itself is never decomposed whole, unless it is tiny. `vectors` gives the vectors themselves, from
    float64 throughout.
    """
    if vectors or base.wants_basis:
        return _with_basis(base, change, top_k, thresholds, vectors=vectors)
    found = _with_bounds(base, change, top_k, thresholds)
    if all(bool(_decided(side, thresholds).all()) for side in (found.left, found.right)):
        return found
    return _with_basis(base, change, top_k, thresholds, vectors=False)


def is_degenerate(base: BaseSpectrum, top_k: int) -> bool:
    """Whether two of the leading singular values of W0 are so close that their vectors turn freely."""
    values = base.leading(top_k).s[: top_k + 1]
    gaps = 1 - values[1:] / values[:-1].clamp_min(1e-300)
    return bool((gaps < _DEGENERATE).any())


def _with_basis(
    base: BaseSpectrum, change: Operator, top_k: int, thresholds: Sequence[float], *, vectors: bool
) -> Examined:
    for dtype in dict.fromkeys((torch.float64 if vectors else base.weight.dtype, torch.float64)):
        found, error = _against_basis(base, change.to(dtype, base.weight.device), top_k, vectors=vectors)
        margin = max(_CLOSE, error)
        sides = (found.left.most, found.right.most)
        if not any(bool(((side - t).abs() < margin).any()) for side in sides for t in thresholds):
            break
    return found


def _against_basis(base: BaseSpectrum, change: Operator, top_k: int, *, vectors: bool) -> tuple[Examined, float]:
    """By the whole basis in the dtype of `change`; the largest error of a vector, with it."""
    basis = base.basis(change.leaf.dtype)
    p = len(basis.s)
    k = min(top_k, p)
    up = down = None
    if isinstance(change, LowRank) and change.rank * _LOW <= p:
        turned = rotated(basis, change)
        axes = torch.eye(turned.low.shape[1], min(k + _MORE, p)).to(basis.s)
        found = leading_triplets(
            sum_of([turned.diagonal, turned.low]), k, start=_start(axes, turned.low), tolerance=_WITHIN
        )
        left, right = found.u[:, :k], found.vt[:k].T
        if vectors:
            up, down = turned.left(left), turned.right(right).T
        left, right = left[:p].T, right[:p].T
    else:
        whole = sum_of([Dense(base.weight.to(change.leaf.dtype)), change])
        found = leading_triplets(whole, k, start=_start(basis.vt[: k + _MORE].T, change), tolerance=_WITHIN)
        up, down = found.u[:, :k], found.vt[:k]
        left, right = up.T @ basis.u, down @ basis.vt.T
    errors = found.errors[:k]
    error = float(errors[torch.isfinite(errors)].max()) if bool(torch.isfinite(errors).any()) else 0.0
    return Examined(found.s[:k].cpu(), _exact(left), _exact(right), "dense", up, down), error


def _start(leading: Tensor, change: Operator) -> Tensor:
    """A block near the leading right vectors of W0 + change: those of W0, directions of the change, and random ones."""
    (m, n), generator = change.shape, torch.Generator().manual_seed(0)
    noise = torch.randn(m, _ALONG_CHANGE, generator=generator).to(leading)
    anything = torch.randn(n, _ANYWHERE, generator=generator).to(leading)
    return torch.cat([leading, change.rmatmat(noise), anything], dim=1)


def _exact(signed: Tensor) -> Cosines:
    sizes = signed.abs().double().cpu()  # (k, p)
    largest = sizes.amax(1).clamp(max=1.0)
    return Cosines(largest, largest, sizes.diagonal().clamp(max=1.0))


def _with_bounds(base: BaseSpectrum, change: Operator, top_k: int, thresholds: Sequence[float]) -> Examined:
    """By the leading triplets of W0 where a vector is like one of them, by bounds on all cosines where it is not."""
    k = min(top_k, *change.shape)
    change = change.to(base.weight.dtype, base.weight.device)
    start = _start(base.leading(k).vt[: k + _MORE].T, change)
    found = leading_triplets(sum_of([Dense(base.weight), change]), k, start=start, tolerance=TOLERANCE)
    up, down = found.u[:, :k], found.vt[:k]
    errors = found.errors[:k]
    known = _proven_where_alike(base, up, down.T, min(thresholds), k)
    pairs = ((known.u, up), (known.vt.T, down.T))
    sides = [_like_leading(mine, vectors, known.errors, errors) for mine, vectors in pairs]
    asked = [_asked(base, known, *pair, side, errors, thresholds) for pair, side in zip(pairs, sides, strict=True)]
    bounds = cosine_bounds([a.question for a in asked])
    for side, a, bound in zip(sides, asked, bounds, strict=True):
        side.most[a.chosen] = torch.maximum(side.among[a.chosen], bound * a.lengths + a.slack)
    left, right = (Cosines(side.least, side.most, side.matched) for side in sides)
    return Examined(found.s[:k].cpu(), left, right, "certified")


def _proven_where_alike(base: BaseSpectrum, left: Tensor, right: Tensor, threshold: float, k: int) -> Leading:
    """The leading triplets of W0, with proven errors for those that some vector is so much alike as to decide it."""
    rough = base.leading(k)
    near = torch.maximum((rough.u.T @ left).abs().amax(1), (rough.vt @ right).abs().amax(1))
    alike = (near >= threshold).nonzero().flatten().tolist()
    return base.leading(k, prove=alike or (0,))


@dataclass(frozen=True, eq=False)
class _Near:
    """As Cosines, from the leading vectors of the base alone; with those, the largest |cosine| is at most `among`, and
    about `near`."""

    least: Tensor
    most: Tensor
    matched: Tensor
    among: Tensor
    near: Tensor


@dataclass(frozen=True, eq=False)
class _Asked:
    """A question about the `chosen` vectors of one side; the answer times `lengths`, plus `slack`, bounds theirs."""

    question: Question
    chosen: Tensor
    lengths: Tensor
    slack: Tensor


def _like_leading(mine: Tensor, vectors: Tensor, mine_errors: Tensor, errors: Tensor) -> _Near:
    near = (mine.T @ vectors).abs().double().cpu()  # (K, k)
    slack = mine_errors.unsqueeze(1) + errors  # infinite where the one or the other is not known
    sure = (near - slack).clamp_min(0.0)
    beyond = (1 - sure.square().sum(0)).clamp_min(0.0).sqrt()  # with all that are not known
    among = torch.where(torch.isfinite(slack), near + slack, 0.0).amax(0).clamp(max=1.0)
    most = torch.maximum(among, beyond)
    return _Near(sure.amax(0), most, near.diagonal().clamp(max=1.0), among, near.amax(0))


def _asked(
    base: BaseSpectrum,
    known: Leading,
    mine: Tensor,
    vectors: Tensor,
    side: _Near,
    errors: Tensor,
    thresholds: Sequence[float],
) -> _Asked:
    """About the vectors whose cosines with all but the known leading ones are open: those are taken out of both."""
    is_left = mine is known.u
    hopeless = side.near >= max(thresholds)  # no bound on all cosines can be below one of them
    chosen = (~_decided(side, thresholds) & torch.isfinite(errors) & ~hopeless).nonzero().flatten()
    matrix: Tensor | None = base.weight if is_left else base.weight.T
    x = vectors[:, chosen.to(vectors.device)]
    taken = _taken_out(known)
    lead, s, lead_errors = mine[:, :taken], known.s[:taken], known.errors[:taken]
    other = (known.vt.T if is_left else known.u)[:, :taken]
    coordinates = lead.T @ x
    x = x - lead @ coordinates
    slack = errors[chosen] + coordinates.double().norm(dim=0).cpu() * float(lead_errors.norm())
    if matrix is not None and matrix.shape[0] > matrix.shape[1]:
        matrix = base.square_factor(left=is_left)
        if matrix is not None and len(chosen):
            tall = base.weight if is_left else base.weight.T
            lead = _in_range(matrix, tall, lead)
            x = _in_range(matrix, tall, x)
            x, matrix = x.to(vectors.dtype), matrix.to(vectors.dtype)
            lead = lead.to(vectors.dtype)
    if matrix is None or not len(chosen):
        chosen, x, slack = chosen[:0], vectors[:1, :0], slack[:0]
        return _Asked(Question(LowRank(x, x.T), x, 1.0, 1.0), chosen, slack, slack)
    lengths = x.norm(dim=0).clamp_min(1e-30)
    open_limits = [t for t in thresholds if bool(((side.least[chosen] < t) & (side.most[chosen] >= t)).any())]
    enough = (min(open_limits) - float(slack.max())) / float(lengths.max())
    op = sum_of([Dense(matrix), LowRank(-lead * s.to(lead), other.T)]) if taken else Dense(matrix)
    off = float((lead_errors * s.cpu()).norm())
    question = Question(op, x / lengths, max(0.0, enough), known.upper[taken], off)
    return _Asked(question, chosen, lengths.double().cpu(), slack)


def _taken_out(known: Leading) -> int:
    """How many leading triplets are known so well that the rest can be asked about without them."""
    small = (known.errors <= _TAKEN_OUT).tolist()
    return small.index(False) if False in small else len(small)


def _in_range(factor: Tensor, tall: Tensor, x: Tensor) -> Tensor:
    """Coordinates of the part of x in the column space of `tall` = Q `factor`, along Q."""
    return torch.linalg.solve_triangular(factor.T, tall.T.double() @ x.double(), upper=False)


def _decided(side: Cosines | _Near, thresholds: Sequence[float]) -> Tensor:
    """For each vector, whether every threshold lies outside its bounds: at or below the one, or above the other."""
    verdicts = [(side.least >= t) | (side.most < t) for t in thresholds]
    return torch.stack(verdicts).all(0) if verdicts else torch.ones(len(side.least), dtype=torch.bool)


def energy_share(values: Tensor, chosen: Sequence[int]) -> float:
    """The share of the squared `values` that the `chosen` ones hold; 0 where all vanish."""
    squares = values.square()
    total = float(squares.sum())
    return math.fsum(squares[list(chosen)].tolist()) / total if total else 0.0
