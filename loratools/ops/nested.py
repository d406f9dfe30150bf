"""How much worse the first components of each target are, as trained, than the best ones: is the adapter nested?

With H = (up^T up) * (down down^T), entry by entry, the inner products of the rank-one components, every squared norm of
a sum of components is a sum of entries of H: nothing larger than r x r is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from loratools.errors import AdapterError
from loratools.families.base import LowRankUpdate
from loratools.ops.spectra import group_targets, stack_blocks
from loratools.pipeline import ordered_map, worker_count
from loratools.reports.inspect import Nested, PrefixErrors, Verdict, doubling

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter

# Prefix errors count as those of the best approximation up to this factor, in the geometric mean over the ranks ...
RATIO = 1.25
# ... if they also stay this far below those of components picked at random: a flat spectrum has no order to find.
ORDER = 0.9
CRITERION = (
    f"prefix error at most {RATIO} x the best (SVD) error and {ORDER} x that of components picked at random, as "
    "geometric means over the ranks below the full one, at the kept scale (nested) or at the best one for each rank "
    "(nested up to scale); thresholds reconstructed, for no published ones are known"
)
_EXACT = 1e-6  # a relative error below this is rounding


@dataclass(frozen=True)
class _Squares:
    """What the errors at one rank are made of; adds up over targets."""

    norm: float  # ||delta||^2
    prefix: float  # ||delta - prefix||^2
    best: float  # the least at this rank
    random: float  # the mean over all choices of that many components
    cross: float  # <delta, prefix>
    own: float  # ||prefix||^2
    random_cross: float  # as cross and own, the means over all choices
    random_own: float


def compare_prefixes(
    adapter: Adapter, spectra: Mapping[str, Sequence[Sequence[float]]], *, device: str = "cpu"
) -> Nested:
    """Errors of the first k components, at the kept scale, against the best rank k, for the targets of `spectra`.

    `spectra` holds the singular values of each target, descending, one list for each block.
    """
    found: dict[str, dict[int, _Squares]] = {}
    skipped: dict[str, str] = {}

    def work(batch: list[str]) -> tuple[dict[str, dict[int, _Squares]], dict[str, str]]:
        updates: dict[str, LowRankUpdate] = {}
        reasons = {}
        for target in batch:
            update = adapter[target]
            if not isinstance(update, LowRankUpdate):
                reasons[target] = f"{update.family} has no components"
                continue
            try:
                update.prefix(1, delta_scale=update.scale, scale=update.scale)
            except AdapterError as error:
                reasons[target] = str(error)
            else:
                updates[target] = update
        stacked = stack_blocks([u.low_rank_part() for u in updates.values()], device) if updates else None
        if stacked is None:
            return {}, reasons | dict.fromkeys(updates, "holds no low-rank factors")
        f, per_part = stacked
        products = (f.left_gram * f.right_gram).cpu()  # (targets * blocks, r, r)
        grams = products.unflatten(0, (-1, per_part)).sum(1)  # blocks are orthogonal to one another
        return {t: _squares(grams[i], spectra[t]) for i, t in enumerate(updates)}, reasons

    for squares, reasons in ordered_map(
        work, group_targets(adapter, list(spectra), device), workers=worker_count(device)
    ):
        found |= squares
        skipped |= reasons
    found = {t: found[t] for t in spectra if t in found}
    ranks = doubling(max((max(rows) for rows in found.values()), default=1))
    total = {k: _errors(_sum([_at(rows, k) for rows in found.values()])) for k in ranks} if found else {}
    judged = [e for k, e in total.items() if k < ranks[-1] and e.best > _EXACT]
    ratio = _geometric_mean([e.prefix / e.best for e in judged])
    rescaled_ratio = _geometric_mean([e.rescaled / e.best for e in judged])
    order = _geometric_mean([e.prefix / e.random for e in judged])
    rescaled_order = _geometric_mean([e.rescaled / e.random_rescaled for e in judged if e.random_rescaled > _EXACT])
    targets = {t: {k: _errors(s) for k, s in rows.items()} for t, rows in found.items()}
    verdict = _verdict(ratio, order, rescaled_ratio, rescaled_order)
    return Nested(verdict, CRITERION, ratio, order, rescaled_ratio, rescaled_order, total, targets, skipped)


def _squares(products: Tensor, spectra: Sequence[Sequence[float]]) -> dict[int, _Squares]:
    """By rank; `products` are the inner products of the components, summed over the blocks."""
    r = products.shape[0]
    head = products.cumsum(0).cumsum(1).diagonal().tolist()  # ||first k + 1||^2
    # From the end, so that a small tail is not the difference of large numbers.
    tail = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0).tolist()  # ||all after the first k||^2
    cross = products.sum(1).cumsum(0).tolist()
    norm, own = float(products.sum()), float(products.trace())
    rows = {}
    for k in doubling(r):
        rows[k] = _Squares(
            norm=norm,
            prefix=max(0.0, tail[k]) if k < r else 0.0,
            best=math.fsum(s * s for block in spectra for s in block[k:]),
            random=_random_square(norm, own, r - k, r),
            cross=cross[k - 1],
            own=head[k - 1],
            random_cross=norm * k / r,
            random_own=_random_square(norm, own, k, r),
        )
    return rows


def _random_square(norm: float, own: float, count: int, r: int) -> float:
    """Mean ||sum||^2 over all choices of `count` of `r` components; `own` is the sum of their own squared norms."""
    pairs = count * (count - 1) / (r * (r - 1)) if r > 1 else 0.0
    return max(0.0, own * count / r + (norm - own) * pairs)


def _at(rows: Mapping[int, _Squares], rank: int) -> _Squares:
    """At `rank`; beyond the full rank of the target, nothing is lost."""
    return rows[rank if rank in rows else max(rows)]


def _sum(squares: Sequence[_Squares]) -> _Squares:
    return _Squares(*(math.fsum(column) for column in zip(*map(astuple, squares), strict=True)))


def _errors(s: _Squares) -> PrefixErrors:
    if s.norm <= 0:
        return PrefixErrors(0.0, 0.0, None, 0.0, 0.0, 0.0, None)
    prefix, best, random = (math.sqrt(square / s.norm) for square in (s.prefix, s.best, s.random))
    return PrefixErrors(
        prefix=prefix,
        best=best,
        ratio=prefix / best if best > _EXACT else None,
        random=random,
        rescaled=min(prefix, _rescaled(s.norm, s.cross, s.own)),  # the difference inside is good to 1e-8 only
        random_rescaled=min(random, _rescaled(s.norm, s.random_cross, s.random_own)),
        multiplier=s.cross / s.own if s.own > 0 else None,
    )


def _rescaled(norm: float, cross: float, own: float) -> float:
    """min over c of ||delta - c part|| / ||delta||."""
    return math.sqrt(max(0.0, 1 - cross * cross / own / norm)) if own > 0 else 1.0


def _geometric_mean(values: Sequence[float]) -> float | None:
    if not values:
        return None
    return math.exp(math.fsum(math.log(value) for value in values) / len(values)) if min(values) > 0 else 0.0


def _verdict(
    ratio: float | None, order: float | None, rescaled_ratio: float | None, rescaled_order: float | None
) -> Verdict:
    if ratio is None or order is None or rescaled_ratio is None or rescaled_order is None:
        return "undecided"
    if ratio <= RATIO:
        return "nested" if order <= ORDER else "undecided"
    return "nested up to scale" if rescaled_ratio <= RATIO and rescaled_order <= ORDER else "not nested"
