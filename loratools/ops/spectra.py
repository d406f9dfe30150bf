"""The singular values of every target, measured without changing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError, NeedsBaseError, naming
from loratools.families.base import LowRankUpdate
from loratools.linalg.factored import Factored, factored, is_finite, singular_values
from loratools.linalg.svd import blocks_of, spectrum
from loratools.operators import LowRank, Operator
from loratools.pipeline import batches, ordered_map, worker_count

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter, Entry
    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update

# Bytes of stored factors worked on at once by each worker; float64 copies take four to eight times as much.
BATCH_BYTES = {"cpu": 4 << 20}
ACCELERATOR_BATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Measured:
    """Singular values of one target's low-rank part, scale included: one descending list for each block."""

    target: str
    blocks: tuple[tuple[float, ...], ...]

    @property
    def values(self) -> tuple[float, ...]:
        """All values, descending."""
        return tuple(sorted((v for block in self.blocks for v in block), reverse=True))


def group_targets(
    adapter: Adapter, targets: Sequence[str], device: str, *, rank: Callable[[str], int] = lambda t: 0
) -> list[list[str]]:
    """Targets of equal family, shapes and rank to be reached, in batches that fit the device."""

    def key(target: str) -> tuple[object, ...]:
        entry = adapter.entries[target]
        return (entry.family, tuple(sorted(entry.specs.items(), key=lambda item: item[0])), entry.layout, rank(target))

    limit = BATCH_BYTES.get(device, ACCELERATOR_BATCH_BYTES)
    return batches(targets, key=key, size=lambda t: adapter.entries[t].nbytes, limit=limit)


def stack_blocks(parts: Sequence[Operator], device: str, *, single: bool = False) -> tuple[Factored, int] | None:
    """Factored form of all blocks of all parts, scale included, and blocks per part; None where one is not low rank.

    `single` lets factors of 16 bits be multiplied in float32; others are in float64 all the same.
    """
    lows = [block for part in parts for block in blocks_of(part) if isinstance(block, LowRank)]
    shapes = {(tuple(low.left.shape), tuple(low.right.shape)) for low in lows}  # the base may tell apart equal entries
    if len(lows) != sum(len(blocks_of(part)) for part in parts) or len(shapes) > 1:
        return None
    single = single and all(low.left.element_size() == low.right.element_size() == 2 for low in lows)
    dtype = torch.float32 if single else torch.float64
    return factored(*stack_factors(lows, device, dtype), single=single), len(lows) // len(parts)


def stack_factors(lows: Sequence[LowRank], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Left factors, scale included, as (b, m, r) and right factors as (b, r, n)."""
    scales = torch.tensor([low.scale for low in lows], dtype=dtype, device=device).reshape(-1, 1, 1)
    left = torch.stack([low.left for low in lows]).to(device, dtype)
    right = torch.stack([low.right for low in lows]).to(device, dtype)
    return left.mul_(scales), right  # cast, then scaled in place: a product of mixed dtypes is many times slower


def base_tensor(adapter: Adapter, target: str, entry: Entry, base: BaseWeights | None) -> Tensor | None:
    """The base weight of a target whose family needs it; NeedsBaseError where none was given."""
    if not entry.needs_base:
        return None
    if base is None:
        raise NeedsBaseError(f"{target}: the delta of {entry.family.family} depends on the base weight; pass --base")
    return base.find(adapter.format.parameter(target), entry.base_shape)


def measure(
    adapter: Adapter,
    targets: Sequence[str] | None = None,
    *,
    base: BaseWeights | None = None,
    device: str = "cpu",
    allow_nonfinite: bool = False,
    directions: bool = False,
) -> Iterator[Measured]:
    """Spectra of `targets` (all, by default), batch by batch; AdapterError names a target with NaN or infinity.

    With `allow_nonfinite` such a target has no values. For families with a base-dependent magnitude the spectrum is
    that of the scaled low-rank part; with `directions` and no base, that of the direction instead of an error.
    """

    def work(batch: list[str]) -> list[Measured]:
        parts, rest = [], []
        for target in batch:
            entry = adapter.entries[target]
            update = entry.read()
            rest.append(is_finite_beside_factors(update))
            if directions and base is None and isinstance(update, LowRankUpdate):
                parts.append(update.direction_operator())
            else:
                weight = base_tensor(adapter, target, entry, base)
                with naming(target):
                    parts.append(low_rank_part(update, weight))
        stacked = stack_blocks(parts, device)
        if stacked is None:
            return [
                _measured_alone(t, p, device, allow_nonfinite, is_finite_beside=sound)
                for t, p, sound in zip(batch, parts, rest, strict=True)
            ]
        f, per_part = stacked
        finite = [a and b for a, b in zip(is_finite(f).reshape(-1, per_part).all(1).tolist(), rest, strict=True)]
        if not all(finite) and not allow_nonfinite:
            raise nonfinite_error(batch[finite.index(False)])
        sound = torch.tensor(finite, device=f.left.device).repeat_interleave(per_part)
        values = torch.zeros(
            f.left.shape[0], min(f.left.shape[1], f.left.shape[2], f.right.shape[2]), dtype=torch.float64
        )
        kept = Factored(f.left[sound], f.right[sound], f.left_gram[sound], f.right_gram[sound])
        values[sound.cpu()] = singular_values(kept).cpu()
        rows = [tuple(row) for row in values.tolist()]
        return [
            Measured(t, tuple(rows[i * per_part : (i + 1) * per_part]) if finite[i] else ())
            for i, t in enumerate(batch)
        ]

    chosen = list(adapter.entries) if targets is None else list(targets)
    for results in ordered_map(work, group_targets(adapter, chosen, device), workers=worker_count(device)):
        yield from results


def low_rank_part(update: Update, base: Tensor | None = None) -> Operator:
    """What ranks and spectra are about: the low-rank part of a factored family, the whole delta of any other."""
    return update.low_rank_part(base) if isinstance(update, LowRankUpdate) else update.operator(base)


def known_delta(update: Update) -> Operator:
    """The delta in float64, or its direction where a magnitude needs the base; AdapterError for what needs it whole."""
    op = update.direction_operator() if isinstance(update, LowRankUpdate) else update.operator()
    return op.to(torch.float64)


def _measured_alone(
    target: str, part: Operator, device: str, allow_nonfinite: bool, *, is_finite_beside: bool
) -> Measured:
    part = part.to(torch.float64, device)
    if not is_finite_beside or not bool(torch.isfinite(part.dense()).all()):
        if not allow_nonfinite:
            raise nonfinite_error(target)
        return Measured(target, ())
    return Measured(target, tuple(tuple(spectrum(block).tolist()) for block in blocks_of(part)))


def is_finite_update(update: Update) -> bool:
    """Whether every stored number of `update` is finite."""
    return all(_is_finite(tensor) for tensor in update.parameters().values())


def is_finite_beside_factors(update: Update) -> bool:
    """As `is_finite_update`, of what the Gram matrices of factors do not show: biases and magnitudes."""
    stored = update.parameters()
    return all(_is_finite(stored[slot]) for slot in ("up_bias", "magnitude") if slot in stored)


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # torch cannot ask this of float8_e4m3fn
    return bool(torch.isfinite(wide).all())


def nonfinite_error(target: str, alternative: str = "pass --allow-nonfinite to go on without it") -> AdapterError:
    """For a target with NaN or infinity; `alternative` is what helps beside training it again."""
    return AdapterError(f"{target}: holds NaN or infinity; retrain it, or {alternative}")


def fit_update(update: Update, part: Operator, *, target: str, scale: float, base: Tensor | None) -> Update:
    """`update.fit`, with the target named in its errors."""
    assert isinstance(update, LowRankUpdate)
    try:
        return update.fit(part, scale=scale, base=base)
    except AdapterError as error:
        raise type(error)(f"{target}: {error}") from error
