"""How near the leading singular vectors of W0 + delta are to those of W0: exactly, or within proven bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from loratools._lazy import torch
from loratools.linalg.basis import rotated
from loratools.linalg.cosine_bounds import Question, cosine_bounds
from loratools.linalg.krylov import Leading, leading_of, leading_triplets, rounding_of
from loratools.operators import Dense, LowRank, Operator, sum_of
from loratools.ops.base_spectra import TOLERANCE, leak

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.ops.base_spectra import BaseSpectrum

Verdict = Literal["dense", "certified"]

_CLOSE = 1e-3  # of a cosine to a threshold: decided in float64
_DEGENERATE = 1e-3  # relative gap of neighbouring singular values, below which their vectors turn freely
# What an iteration begins with: leading vectors of W0 beyond those asked for, directions of the change, random ones.
_MORE, _ALONG_CHANGE, _ANYWHERE = 10, 8, 4
_WITHIN = 3e-4  # of a vector of W0 + change; closer calls are made in float64
_LOOSE = 0.03  # of a vector; what iteration leaves less sure is decomposed
_EXACT = 1e-7  # of a vector that an edit is made of
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
    """The first k singular vectors of W0 + delta against all of W0; the two bounds are one number where dense."""

    values: Tensor  # (k,) float64
    left: Cosines
    right: Cosines
    verdict: Verdict


def examine(base: BaseSpectrum, change: Operator, *, top_k: int, thresholds: Sequence[float]) -> Examined:
    """The leading vectors of W0 + `change`, with every verdict at `thresholds` decided.

    W0 + change itself is decomposed whole only where it is small, where `top_k` is a large share of it, or where its
    leading vectors cannot be told apart otherwise.
    """
    change = change * (1 / base.scale)
    found = None if base.wants_basis else _with_bounds(base, change, top_k, thresholds)
    if found is None or not all(bool(_decided(side, thresholds).all()) for side in (found.left, found.right)):
        found = _with_basis(base, change, top_k, thresholds)
    return replace(found, values=found.values * base.scale)


def tuned_triplets(base: BaseSpectrum, change: Operator, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular triplets (u, s, vt) of W0 + `change`, in float64, to rounding."""
    whole = sum_of([Dense(base.weight_in(torch.float64)), (change * (1 / base.scale)).to(torch.float64)])
    k = min(top_k, *whole.shape)
    start = _start(base.leading(k).vt[: k + _MORE].T.double(), whole)
    found = leading_triplets(whole, k, start=start, tolerance=_EXACT)
    u, s, vt = found.u, found.s, found.vt
    if not bool((found.errors[:k] <= _EXACT).all()):
        u, s, vt = torch.linalg.svd(whole.dense(), full_matrices=False)
    return u[:, :k], s[:k] * base.scale, vt[:k]


def is_degenerate(base: BaseSpectrum, top_k: int) -> bool:
    """Whether two of the leading singular values of W0 are so close that their vectors turn freely."""
    return turn_freely(base.leading(top_k).s[: top_k + 1].tolist())


def turn_freely(values: Sequence[float]) -> bool:
    """Whether two neighbours of these singular values are so close that their vectors turn into each other."""
    return any(value - following < _DEGENERATE * value for value, following in pairwise(values))


def _with_basis(base: BaseSpectrum, change: Operator, top_k: int, thresholds: Sequence[float]) -> Examined:
    """By the whole basis; in float64 where a cosine is nearer to a threshold than the vectors are to the truth."""
    for dtype in dict.fromkeys((base.weight.dtype, torch.float64)):
        found, margins = _against_basis(base, change.to(dtype, base.weight.device), top_k)
        sides = zip((found.left.most, found.right.most), margins, strict=True)
        if not any(bool(((side - t).abs() < margin).any()) for side, margin in sides for t in thresholds):
            break
    return found


def _against_basis(base: BaseSpectrum, change: Operator, top_k: int) -> tuple[Examined, tuple[Tensor, Tensor]]:
    """By the whole basis in the dtype of `change`; with it, how far off each largest cosine may be, left and right."""
    dtype = change.leaf.dtype
    basis = base.basis(dtype)
    p = len(basis.s)
    k = min(top_k, p)
    whole = sum_of([Dense(base.weight if dtype == base.weight.dtype else base.weight_in(dtype)), change])
    if isinstance(change, LowRank) and change.rank * _LOW <= p:
        turned = rotated(basis, change)
        axes = torch.eye(turned.low.shape[1], min(k + _MORE, p)).to(basis.s)
        core = sum_of([turned.diagonal, turned.low])
        found = leading_triplets(core, k, start=_start(axes, turned.low), tolerance=_WITHIN)
        left, right = found.u[:p, :k].T, found.vt[:k, :p]
    else:
        found = leading_triplets(whole, k, start=_start(basis.vt[: k + _MORE].T, change), tolerance=_WITHIN)
        left, right = found.u[:, :k].T @ basis.u, found.vt[:k] @ basis.vt.T
    if not bool((found.errors[:k] <= _LOOSE).all()):
        u, s, vt = torch.linalg.svd(whole.dense(), full_matrices=False)
        found = leading_of(u, s.double(), vt, k)
        left, right = found.u.T @ basis.u, found.vt @ basis.vt.T
    lost = leak(float(basis.s.norm()), float(basis.s[-1]), dtype)
    margins = tuple(
        found.errors[:k].clamp_min(_CLOSE)
        + _turned(basis.s, side)
        + lost * (1 - side.double().square().sum(1)).clamp_min(0.0).sqrt().cpu()
        for side in (left, right)
    )
    return Examined(found.s[:k].cpu(), _exact(left), _exact(right), "dense"), (margins[0], margins[1])


def _turned(s: Tensor, cosines: Tensor) -> Tensor:
    """By how much rounding of W0 may have changed the largest cosine of each row, to first order.

    It turns two singular vectors into each other by itself over the distance of their values, at most wholly.
    """
    values, sizes = s.double(), cosines.double().abs()
    largest = sizes.argmax(1, keepdim=True)  # (k, 1)
    apart = (values - values[largest]).abs()  # (k, p)
    turned = (rounding_of(s) / apart.clamp_min(1e-300)).clamp(max=1.0).scatter(1, largest, 0.0)
    return (turned * sizes).norm(dim=1).cpu()


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
    lefts, rights = (
        _Side(True, base.weight, known.u, known.vt.T, up),
        _Side(False, base.weight.T, known.vt.T, known.u, down.T),
    )
    sides = [_like_leading(side.known, side.vectors, known.errors, errors) for side in (lefts, rights)]
    asked = [
        _asked(base, known, side, near, errors, thresholds) for side, near in zip((lefts, rights), sides, strict=True)
    ]
    bounds = cosine_bounds([a.question for a in asked])
    for near, a, bound in zip(sides, asked, bounds, strict=True):
        near.most[a.chosen] = torch.maximum(near.among[a.chosen], bound * a.lengths + a.slack)
    left, right = (Cosines(near.least, near.most, near.matched) for near in sides)
    return Examined(found.s[:k].cpu(), left, right, "certified")


def _proven_where_alike(base: BaseSpectrum, left: Tensor, right: Tensor, threshold: float, k: int) -> Leading:
    """The leading triplets of W0, with proven errors for those that some vector is so much alike as to decide it."""
    rough = base.leading(k)
    near = torch.maximum((rough.u.T @ left).abs().amax(1), (rough.vt @ right).abs().amax(1))
    alike = (near >= threshold).nonzero().flatten().tolist()
    return base.leading(k, prove=alike or (0,))


@dataclass(frozen=True, eq=False)
class _Side:
    """W0, or its transpose; its known leading vectors, those of the other side, and the vectors in question."""

    left: bool
    matrix: Tensor  # (m, n)
    known: Tensor  # (m, K)
    opposite: Tensor  # (n, K)
    vectors: Tensor  # (m, k)


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
    base: BaseSpectrum, known: Leading, side: _Side, near: _Near, errors: Tensor, thresholds: Sequence[float]
) -> _Asked:
    """About the vectors whose cosines with all but the known leading ones are open: those are taken out of both."""
    hopeless = near.near >= max(thresholds)  # no bound on all cosines can be below one of them
    chosen = (~_decided(near, thresholds) & torch.isfinite(errors) & ~hopeless).nonzero().flatten()
    if not len(chosen):
        nothing = side.vectors[:1, :0]
        return _Asked(Question(LowRank(nothing, nothing.T), nothing, 1.0, 1.0), chosen[:0], errors[:0], errors[:0])
    taken = _taken_out(known)
    lead, s, lead_errors = side.known[:, :taken], known.s[:taken], known.errors[:taken]
    x = side.vectors[:, chosen.to(side.vectors.device)]
    coordinates = lead.T @ x
    x = x - lead @ coordinates
    slack = errors[chosen] + coordinates.double().norm(dim=0).cpu() * float(lead_errors.norm())
    matrix = side.matrix
    if matrix.shape[0] > matrix.shape[1]:  # what lies outside its columns has no cosine with any of its vectors
        square = base.square(left=side.left)
        matrix, whole = square.r, x.double().square().sum(0)
        lead, x = square.q.T @ lead, square.q.T @ x
        outside = (whole - x.double().square().sum(0)).clamp_min(0.0).sqrt().cpu()
        slack = slack + square.leak * outside
    lengths = x.norm(dim=0).clamp_min(1e-30)
    open_limits = [t for t in thresholds if bool(((near.least[chosen] < t) & (near.most[chosen] >= t)).any())]
    enough = (min(open_limits) - float(slack.max())) / float(lengths.max())
    rest = LowRank(-lead * s.to(lead), side.opposite[:, :taken].T)
    op = sum_of([Dense(matrix), rest]) if taken else Dense(matrix)
    # As far up as the largest singular value: which ones the known triplets belong to is not proven.
    question = Question(op, x / lengths, max(0.0, enough), known.upper[0], float((lead_errors * s.cpu()).norm()))
    return _Asked(question, chosen, lengths.double().cpu(), slack)


def _taken_out(known: Leading) -> int:
    """How many leading triplets are known so well that the rest can be asked about without them."""
    small = (known.errors <= _TAKEN_OUT).tolist()
    return small.index(False) if False in small else len(small)


def _decided(side: Cosines | _Near, thresholds: Sequence[float]) -> Tensor:
    """For each vector, whether every threshold lies outside its bounds: at or below the one, or above the other."""
    verdicts = [(side.least >= t) | (side.most < t) for t in thresholds]
    return torch.stack(verdicts).all(0) if verdicts else torch.ones(len(side.least), dtype=torch.bool)


def energy_share(values: Tensor, chosen: Sequence[int]) -> float:
    """The share of the squared `values` that the `chosen` ones hold; 0 where all vanish."""
    squares = values.square()
    total = float(squares.sum())
    return math.fsum(squares[list(chosen)].tolist()) / total if total else 0.0
