"""Families that a dialect has no place for, as the LoRA that they are exactly, or the best one of a rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.adapter import entry_of
from loratools.errors import UnsupportedInTargetError
from loratools.families import DoRA, LoRA, MergedLoRA, Update
from loratools.families.regroup import composed, from_low_rank
from loratools.linalg.inner import frobenius
from loratools.linalg.svd import spectrum, truncate
from loratools.operators import LowRank, Operator, sum_of

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.formats import Format


@dataclass(frozen=True)
class Lowering:
    """What may be done to an update that a dialect cannot hold: nothing, unless `exact`, `rank` or `energy` says so.

    `exact` writes low-rank updates as the LoRA that they are; `rank` or `energy` (share of the squared spectrum)
    approximates any other one by its truncated SVD.
    """

    exact: bool = False
    rank: int | None = None
    energy: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Lowered:
    """What was done to one update; `relative_error` is that of the stored delta, None where it is exact."""

    actions: tuple[str, ...] = ()
    relative_error: float | None = None

    def worse(self, other: Lowered) -> Lowered:
        """Both together, with the larger error."""
        errors = [e for e in (self.relative_error, other.relative_error) if e is not None]
        actions = (*self.actions, *(a for a in other.actions if a not in self.actions))
        return Lowered(actions, max(errors, default=None))


def lowered(
    update: Update,
    destination: type[Format],
    base: Tensor | None,
    lowering: Lowering,
    *,
    plain: bool,
    bias: Tensor | None = None,
) -> tuple[Update, Lowered]:
    """`update` in a family and with slots that `destination` holds; with `plain`, one whose rows come apart.

    `base` and `bias` are the base's own, where the update needs them; its change of the bias becomes that of the LoRA.
    UnsupportedInTargetError says what would be allowed.
    """
    if isinstance(update, MergedLoRA):  # the same numbers in the shape of a LoRA, whatever is allowed
        update = update.expanded()
    held = update.family in destination.holds and destination.lacks(update.layout, set(update.parameters())) is None
    if held and not (plain and not isinstance(update, LoRA | DoRA)):
        if "mid" not in update.parameters() or ("mid" in destination.slots and not plain):
            return update, Lowered()
        inner = update.direction if isinstance(update, DoRA) else update
        assert isinstance(inner, LoRA)
        whole = composed(inner)
        return (replace(update, direction=whole) if isinstance(update, DoRA) else whole), Lowered(
            ("Tucker core multiplied into down",)
        )
    if (lack := destination.lacks(update.layout, set())) is not None:
        raise UnsupportedInTargetError(f"{destination.name} has no place for an update of {lack}")
    lack = destination.lacks(update.layout, set(update.parameters()))
    what = f"rows of {update.family}" if plain else lack or update.family
    if (why := destination.kindred.get(update.family)) is not None:
        what = f"{what} ({why})"
    if update.awaits_base(update.layout) and base is None and lowering == Lowering(seed=lowering.seed):
        raise UnsupportedInTargetError(
            f"{destination.name} has no place for {what}; pass --base with --rank N or --energy E to approximate it, "
            "with the error printed"
        )
    op = update.operator(base).to(torch.float64)
    shape = tuple(base.shape) if base is not None else _shape(update)
    if len(shape) == 1:
        raise UnsupportedInTargetError(f"{destination.name} has no place for a change of a norm")
    rank = _rank(op, lowering)
    if rank is None:
        remedy = (
            f"pass --exact for the LoRA of rank {op.rank} that it is exactly, or --rank N for an approximation"
            if isinstance(op, LowRank)
            else "pass --rank N or --energy E to approximate it, with the error printed"
        )
        raise UnsupportedInTargetError(f"{destination.name} has no place for {what}; {remedy}")
    best = op if lowering.exact and isinstance(op, LowRank) else truncate(op, rank, seed=lowering.seed).operator
    layout = replace(update.layout, magnitude_axis=0)
    made = from_low_rank(
        best,
        _oriented(shape, layout.transposed),
        layout=layout,
        scale=1.0,
        dtype=torch.float32,
        bias=update.bias_delta(bias),
    )
    norm = frobenius(op)
    error = frobenius(sum_of([op, -made.operator().to(torch.float64)])) / norm if norm else 0.0
    exact = lowering.exact and isinstance(op, LowRank)
    how = f"{update.family} as LoRA of rank {rank}{', exactly' if exact else ''}"
    return made, Lowered((how,), None if exact else error)


def _rank(op: Operator, lowering: Lowering) -> int | None:
    if lowering.exact and isinstance(op, LowRank):
        return op.rank
    if lowering.rank is not None:
        return min(lowering.rank, *op.shape)
    if lowering.energy is None:
        return None
    values = spectrum(op)
    squares = values.square().cumsum(0)
    total = float(squares[-1])
    return next((k + 1 for k, kept in enumerate(squares.tolist()) if kept >= lowering.energy * total), len(values))


def _shape(update: Update) -> tuple[int, ...]:
    shape = entry_of(update).base_shape
    assert shape is not None  # a family whose files do not tell needs the base
    return shape


def _oriented(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """(m, n, *kernel) of an operator from the shape of its base parameter."""
    if len(shape) == 1:
        return (shape[0], 1)
    return (shape[1], shape[0]) if transposed else shape
