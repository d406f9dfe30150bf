"""The ways in which the adapters that have a target can share its bases, each fitted and measured."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratools._lazy import torch
from loratools.hub.pack.layout import Method, Numbers, Shared
from loratools.linalg.joint_diagonal import jointly_diagonal, shrunk
from loratools.linalg.shared_bases import (
    Bases,
    Batches,
    atoms,
    clustered,
    core_squares,
    cores,
    diagonals,
    joint,
    left_over,
    seeded,
)
from loratools.operators import LowRank
from loratools.storage.atomic import explained

if TYPE_CHECKING:
    from torch import Tensor

PRIVATE: Final = 2  # components of its own that an adapter may have beside shared bases
_WIDTHS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
WIDEST: Final = _WIDTHS[-1]
_GROUPS: Final = (2, 4)
_ATOMS: Final = (2, 4, 8, 16, 32)
_WIDEST_ATOMS: Final = 32
_WIDEST_DIAGONAL: Final = 64
_PENALTIES: Final = (0.02, 0.1)  # shares of the largest coefficient
_FITTED: Final = 64  # adapters that a diagonal fit is made on; the rest get coefficients
_DIAGONAL_SWEEPS: Final = 12
_RESTARTS: Final = 2
_CLUSTER_SWEEPS: Final = 3
_NOTHING: Final = 1e-12  # of the squared norm of a delta: a component of no more is none
# Squared relative error that codes add to a matrix of Gaussian numbers, in planning; what is reported is measured.
CODED: Final = {0: 0.0, 4: 0.0105, 8: 4e-5}


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way: what its bases cost, and for each adapter that has the target what it stores and gains by them.

    Gains are shares of the squared norm of an adapter's delta. A core can be stored whole, which captures `captured`,
    or as factors of some rank, of which each component captures its part of `inner`. `file` holds the bases, encoded,
    one pair after the other.
    """

    shared: Shared
    base_bytes: int  # of all pairs
    group: Tensor  # (t,) int64: the pair that serves each
    kept: Tensor  # (t,) int64: coefficients that are not zero, of sparse ones
    captured: Tensor  # (t,)
    private: Tensor  # (t, at most PRIVATE): by further components of its own, beside all that bases capture
    rank: Tensor  # (t,) int64: of the core, where one is stored
    inner: Tensor  # (t, at most Shared.most_factors) float32: by components of the core
    file: Path
    penalty: float = 0.0  # of sparse coefficients


@dataclass(frozen=True, eq=False)
class _Fit:
    """Bases in common coordinates with what they capture."""

    shared: Shared
    bases: tuple[Bases, ...]
    atoms: tuple[Tensor, ...] = ()


def candidates(
    batches: Batches,
    spectra: Tensor,
    coordinates: tuple[Tensor, Tensor],
    *,
    methods: frozenset[str],
    numbers: Numbers,
    limit: float,
    private: bool,
    seed: int,
    folder: Path,
) -> Iterator[Candidate]:
    """Fit all that the methods offer whose bases take at most `limit` bytes; bases go to files in `folder`."""
    shape = coordinates[0].shape[0], coordinates[1].shape[0]
    p, q = coordinates[0].shape[1], coordinates[1].shape[1]
    for fit in _fits(
        batches, len(spectra), (p, q), methods, lambda s: s.groups * s.base_size(shape, numbers) <= limit, seed
    ):
        yield from _measured(batches, spectra, coordinates, fit, numbers, private=private, folder=folder)


def _fits(
    batches: Batches,
    count: int,
    size: tuple[int, int],
    methods: frozenset[str],
    fits: Callable[[Shared], bool],
    seed: int,
) -> Iterator[_Fit]:
    least = min(size)
    widths = [w for w in _WIDTHS if w <= least]
    if least and least not in widths and least <= WIDEST:
        widths.append(least)
    begins: dict[int, list[Tensor]] = {}  # groups that clusters of so many begin in
    for i, width in enumerate(widths):
        start = Bases(torch.eye(size[0], width, dtype=torch.float64), torch.eye(size[1], width, dtype=torch.float64))
        whole = Shared("joint", width)
        if methods & {"joint", "atoms"} and fits(whole):
            found = joint(batches, start)[0]
            if "joint" in methods:
                yield _Fit(whole, (found,))
            if "atoms" in methods and width <= _WIDEST_ATOMS and i % 2:
                wanted = [n for n in _ATOMS if n < min(count, width**2) and fits(Shared("atoms", width, 1, n))]
                all_ = atoms(batches, found, max(wanted), count) if wanted else None
                for number in wanted:
                    assert all_ is not None
                    yield _Fit(Shared("atoms", width, 1, number), (found,), (all_[:number],))
        if "cluster" in methods and i % 2:
            for groups in (g for g in _GROUPS if 4 * g <= count and fits(Shared("cluster", width, g))):
                if groups not in begins:
                    similar = partial(_cosines, batches)
                    begins[groups] = [seeded(similar, count, groups, seed=seed + n) for n in range(_RESTARTS)]
                clusters, begins[groups] = _clusters(batches, begins[groups], start)
                yield clusters
        if methods & {"diag", "sparse"} and i % 2 and width <= _WIDEST_DIAGONAL and fits(Shared("diag", width)):
            bases = _diagonal(batches, count, width, seed)
            yield from (_Fit(Shared(m, width), (bases,)) for m in _DIAGONALS if m in methods)


_DIAGONALS: Final[tuple[Method, ...]] = ("diag", "sparse")


def _clusters(batches: Batches, begins: Sequence[Tensor], start: Bases) -> tuple[_Fit, list[Tensor]]:
    """The best of some beginnings, and the groups that it ended in: where wider bases begin."""
    ends = [clustered(batches, where, start, sweeps=_CLUSTER_SWEEPS) for where in begins]
    found, where, _ = max(ends, key=lambda end: float(end[2].sum()))
    return _Fit(Shared("cluster", start.u.shape[1], len(found)), tuple(found)), [where]


def _cosines(batches: Batches, index: int) -> Tensor:
    """The inner products of one normalised delta with all."""
    at, found = 0, None
    for x, y in batches():
        if index < at + len(x):
            found = x[index - at].clone(), y[index - at].clone()
            break
        at += len(x)
    assert found is not None
    return torch.cat([((found[0].T @ x) * (found[1].T @ y)).sum((1, 2)) for x, y in batches()])


def _diagonal(batches: Batches, count: int, width: int, seed: int) -> Bases:
    """Of evenly spaced adapters, where there are many."""
    chosen = {round(i * (count - 1) / max(1, min(count, _FITTED) - 1)) for i in range(min(count, _FITTED))}
    lows, at = [], 0
    for x, y in batches():
        lows += [LowRank(x[i - at].clone(), y[i - at].T.clone()) for i in range(at, at + len(x)) if i in chosen]
        at += len(x)
    lows = [low for low in lows if bool(low.left.any())]
    found = jointly_diagonal(lows, width, seed=seed, sweeps=_DIAGONAL_SWEEPS)
    return Bases(found.left, found.right.T)


def _measured(
    batches: Batches,
    spectra: Tensor,
    coordinates: tuple[Tensor, Tensor],
    fit: _Fit,
    numbers: Numbers,
    *,
    private: bool,
    folder: Path,
) -> Iterator[Candidate]:
    """What a fit costs and gains; of sparse coefficients, once for each penalty."""
    shape = coordinates[0].shape[0], coordinates[1].shape[0]
    file, lost = None, 0.0
    for penalty in _PENALTIES if fit.shared.method == "sparse" else (0.0,):
        if penalty:
            penalty *= _largest(batches, fit.bases[0])
        found = [_group(batches, spectra, fit, g, penalty, private) for g in range(len(fit.bases))]
        group = torch.stack([f.captured for f in found]).argmax(0)
        at = group, torch.arange(len(group))
        best = _Gains(*(torch.stack(field)[at] for field in zip(*(vars(f).values() for f in found), strict=True)))
        if file is None:
            file, lost = _stored(fit, coordinates, numbers, folder)
        bytes_ = fit.shared.groups * fit.shared.base_size(shape, numbers)
        coded = CODED[numbers.bits]
        whole = max(0.0, 1 - lost - (coded if fit.shared.method in ("joint", "cluster") else 0.0))
        captured, further = best.captured * whole, best.private * (1 - 2 * coded)
        inner = best.inner * max(0.0, 1 - lost - 2 * coded)
        yield Candidate(fit.shared, bytes_, group, best.kept, captured, further, best.rank, inner, file, penalty)


def _largest(batches: Batches, bases: Bases) -> float:
    """The largest product of a delta with a pair of vectors."""
    return max(float(((x.mT @ bases.u) * (y.mT @ bases.v)).sum(1).abs().max()) for x, y in batches())


@dataclass(frozen=True, eq=False)
class _Gains:
    """What one pair of bases captures of each adapter, with the fields of `Candidate`."""

    captured: Tensor
    private: Tensor
    kept: Tensor
    rank: Tensor
    inner: Tensor


def _group(batches: Batches, spectra: Tensor, fit: _Fit, g: int, penalty: float, private: bool) -> _Gains:
    bases, at = fit.bases[g], 0
    rows = []
    for x, y in batches():
        squares = spectra[at : at + len(x), : x.shape[2]].sqrt()
        at += len(x)
        core, gained, kept = _cores(x, y, fit, g, penalty)
        further = gained.new_zeros(len(x), 0)
        if private and fit.shared.method != "atoms":  # which are for many adapters with little of their own
            square = torch.diag_embed(squares)
            further = left_over(x, y, (square, square), bases, core, PRIVATE)
        rank, inner = _components(x, y, fit, g, spectra.shape[1])
        rows.append((gained.clamp(0, 1), further, kept, rank, inner))
    return _Gains(*(torch.cat(column) for column in zip(*rows, strict=True)))


def _components(x: Tensor, y: Tensor, fit: _Fit, g: int, rank: int) -> tuple[Tensor, Tensor]:
    """(rank of each core (t,), what its leading components capture (t, no more than any adapter's `rank`))."""
    most = min(fit.shared.most_factors, rank)
    if not most:
        return torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x), 0)
    squares = core_squares(x, y, fit.bases[g])
    squares = torch.where(squares > _NOTHING, squares, 0.0)
    inner = torch.nn.functional.pad(squares[:, :most], (0, max(0, most - squares.shape[1])))
    return (squares > 0).sum(1), inner.float()  # of which there are many


def _cores(x: Tensor, y: Tensor, fit: _Fit, g: int, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    bases, none = fit.bases[g], torch.zeros(len(x), dtype=torch.int64)
    if fit.shared.method in ("joint", "cluster"):
        core = cores(x, y, bases)
        return core, core.square().sum((1, 2)), none
    if fit.shared.method == "atoms":
        weights = cores(x, y, bases).flatten(1) @ fit.atoms[g].flatten(1).T
        return (weights @ fit.atoms[g].flatten(1)).reshape(-1, *fit.atoms[g].shape[1:]), weights.square().sum(1), none
    s, gained = diagonals(x, y, bases)
    if fit.shared.method == "sparse":
        gram = (bases.u.T @ bases.u) * (bases.v.T @ bases.v)
        sides = ((x.mT @ bases.u) * (y.mT @ bases.v)).sum(1)
        s = shrunk(gram, sides, s, penalty, passes=8)
        gained, none = (s * sides).sum(1), (s != 0).sum(1)
    return torch.diag_embed(s), gained, none


def _stored(fit: _Fit, coordinates: tuple[Tensor, Tensor], numbers: Numbers, folder: Path) -> tuple[Path, float]:
    """The bases in a file, and the share of what they capture that rounding them loses, to first order."""
    parts, lost = [], 0.0
    for i, bases in enumerate(fit.bases):
        rows = [(coordinates[0] @ bases.u).T, (coordinates[1] @ bases.v).T]
        rows += [fit.atoms[i].flatten(1)] if fit.atoms else []
        for matrix in rows:
            data = numbers.encode(matrix)
            parts.append(data)
            if numbers.bits:
                off = float((numbers.decode(data, *matrix.shape) - matrix).square().sum() / matrix.square().sum())
                lost = max(lost, off)
    file = folder / f"{secrets.token_hex(8)}.bases"
    with explained(file):
        file.write_bytes(torch.cat(parts).numpy().tobytes())
    return file, 2 * lost
