"""Spectra and best factors of the updates of an adapter, in the norm that their inputs make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError, naming
from loratools.families.base import LowRankUpdate
from loratools.linalg.input_norm import InputNorm
from loratools.linalg.svd import Truncation
from loratools.linalg.weighted import weighted_factors
from loratools.operators import LowRank, Operator, sum_of
from loratools.ops.spectra import Measured, base_tensor, is_finite_update, known_delta, low_rank_part, nonfinite_error
from loratools.pipeline import ordered_map, worker_count

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update
    from loratools.ops.statistics import Statistics


def truncate_weighed(part: Operator, rank: int, moment: Tensor) -> Truncation:
    """The optimum of `rank` in ||delta C^(1/2)||, with the weighted spectrum; `part` has the factors of the moment."""
    if not isinstance(part, LowRank):
        raise AdapterError("only plain factors can be weighed by their inputs")
    if rank > min(part.shape):
        raise AdapterError(f"rank {rank} exceeds the dimensions {part.shape[0]} x {part.shape[1]}")
    up, down, s = weighted_factors(part.left.double() * part.scale, part.right, moment.to(part.left.device))
    return Truncation(LowRank(up[:, :rank], down[:rank]), (s,), complete=True)


def measure_weighed(
    adapter: Adapter,
    targets: Sequence[str],
    weights: Statistics,
    *,
    base: BaseWeights | None = None,
    device: str = "cpu",
    allow_nonfinite: bool = False,
) -> Iterator[Measured]:
    """As `measure`, with the singular values of delta C^(1/2).

    AdapterError where the statistics are of another adapter.
    """

    def work(target: str) -> Measured:
        update = adapter[target]
        if not is_finite_update(update):
            if not allow_nonfinite:
                raise nonfinite_error(target)
            return Measured(target, ())
        weight = base_tensor(adapter, target, adapter.entries[target], base)
        moment = weights.moment_of(target, update)
        with naming(target):
            part = low_rank_part(update, weight).to(torch.float64, device)
            return Measured(target, (tuple(truncate_weighed(part, 0, moment).spectra[0].tolist()),))

    yield from ordered_map(work, targets, workers=worker_count(device))


def input_norm(target: str, update: Update, weights: Statistics) -> InputNorm:
    """The norm that the inputs of a target make of its deltas; AdapterError where they are of another adapter."""
    assert isinstance(update, LowRankUpdate)
    part = update.direction_operator()
    if not isinstance(part, LowRank):
        raise AdapterError(f"{target}: only plain factors can be weighed by their inputs")
    with naming(target):
        return InputNorm.of(part.right, weights.moment_of(target, update), weights.channels(target))


def weighed_squares(target: str, before: Update, after: Update, weights: Statistics) -> tuple[float, float]:
    """(||(delta - delta') C^(1/2)||^2, ||delta C^(1/2)||^2) with C as `InputNorm` takes it; of directions, for DoRA."""
    norm = input_norm(target, before, weights)
    one, other = known_delta(before), known_delta(after)
    return norm.squared(sum_of([one, -other])), norm.squared(one)
