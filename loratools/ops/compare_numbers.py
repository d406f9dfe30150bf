"""The numbers of one matrix: of each update of it, of each pair of them, and of what one misses of another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg import norms
from loratools.linalg.inner import frobenius, inner
from loratools.linalg.subspace import overlap
from loratools.linalg.svd import thin_svd
from loratools.operators import Dense, LowRank, sum_of
from loratools.reports.compare import MAX_VALUES, Missed, PairNumbers, UpdateNumbers

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.operators import Operator

_NOISE = 1e-7  # singular values below this share of the largest are rounding
_IN_DOUBLE = 1024  # the shorter side of a dense change that is decomposed in float64; longer ones in float32


@dataclass(frozen=True, eq=False)
class Decomposed:
    """One update of one matrix, in float64, with its thin SVD.

    `rank` counts the singular vectors that make up its own spaces: those that are not rounding, at most `limit`, which
    is the rank of the low-rank part where there is one: a magnitude makes the whole delta one of full rank.
    """

    operator: LowRank | Dense
    up: Tensor  # (m, k)
    values: Tensor  # (k,), descending
    down: Tensor  # (k, n)
    norm: float
    rank: int
    limit: int | None


def decomposed(change: Operator, limit: int | None, device: str = "cpu") -> Decomposed:
    """The SVD of a change, from its factors where it is low rank."""
    operator = change.to(torch.float64, device)
    if not isinstance(operator, LowRank):
        operator = Dense(operator.dense())
    if isinstance(operator, Dense) and min(operator.shape) > _IN_DOUBLE:
        up, values, down = (t.double() for t in torch.linalg.svd(operator.matrix.float(), full_matrices=False))
    else:
        up, values, down = thin_svd(operator)
    rank = int((values > _NOISE * values[:1]).sum())
    rank = rank if limit is None else min(rank, limit)
    return Decomposed(operator, up, values, down, float(values.norm()), rank, limit)


@dataclass(frozen=True, eq=False)
class AgainstBase:
    """What the base says of an update: its norm, its leading singular vectors, and the intruders it finds."""

    norm: float
    left: Tensor  # (m, top_k)
    right: Tensor  # (n, top_k)
    left_intruders: int
    right_intruders: int


def update_numbers(
    found: Decomposed,
    family: str,
    against: AgainstBase,
    *,
    stored_rank: int,
    gain: Tensor | None,
    growth: float | None,
    missed: Missed | None,
) -> UpdateNumbers:
    """The record of one update; `share` is still 0, for it takes the norms of all matrices."""
    values = found.values.tolist()
    return UpdateNumbers(
        family=family,
        rank=stored_rank,
        norm=found.norm,
        relative_norm=found.norm / against.norm if against.norm else None,
        spectrum=tuple(values[:MAX_VALUES]),
        effective_rank=norms.effective_rank(values),
        stable_rank=norms.stable_rank(values),
        energy_left=_share(found.operator.rmatmat(against.left), found.norm),
        energy_right=_share(found.operator.matmat(against.right), found.norm),
        share=0.0,
        left_intruders=against.left_intruders,
        right_intruders=against.right_intruders,
        gain=None if gain is None else (float(gain.min()), float(gain.mean()), float(gain.max())),
        logit_growth=growth,
        missed=missed,
    )


def _share(part: Tensor, norm: float) -> float:
    """Of a squared norm; 0 where there is none to share."""
    return min(1.0, (float(part.norm()) / norm) ** 2) if norm else 0.0


def missed_by(own: Decomposed, full: Decomposed, of: str) -> Missed | None:
    """What `own` misses of the full fine-tune `full`, named `of`; None where that changed nothing."""
    if not full.norm:
        return None
    rank = min(own.rank if own.limit is None else own.limit, len(full.values))
    own_up, own_down = own.up[:, : own.rank], own.down[: own.rank]
    inside = float((own_up.T @ full.operator.matmat(own_down.T)).norm()) / full.norm
    return Missed(
        of=of,
        rank=rank,
        error=frobenius(sum_of([full.operator, -own.operator])) / full.norm,
        best_error=float(full.values[rank:].norm()) / full.norm,
        space_error=math.sqrt(max(0.0, 1.0 - inside**2)),
    )


def pair_numbers(names: tuple[str, str], a: Decomposed, b: Decomposed, max_rank: int) -> PairNumbers:
    """Two updates of one matrix; what is not defined, for one of them is zero, is None."""
    rank = min(a.rank, b.rank, max_rank)
    cosine = inner(a.operator, b.operator) / (a.norm * b.norm) if a.norm and b.norm else None
    distance = frobenius(sum_of([a.operator, -b.operator]))
    return PairNumbers(
        a=names[0],
        b=names[1],
        cosine=None if cosine is None else max(-1.0, min(1.0, cosine)),
        relative_distance=distance / a.norm if a.norm else None if b.norm else 0.0,
        output_overlap=overlap(a.up[:, :rank], b.up[:, :rank]) if rank else None,
        input_overlap=overlap(a.down[:rank].T, b.down[:rank].T) if rank else None,
        overlap_rank=rank or None,
    )
