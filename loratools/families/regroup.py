"""LoRA updates cut by rows, joined, rescaled and padded: exactly, wherever the numbers allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import Layout, Update
from loratools.families.dora import DoRA
from loratools.families.lora import LoRA, cast_to
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor


STORED: Mapping[str, str] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def recast(update: Update, dtype: str) -> Update:
    """The factors in another dtype, by torch's name; a magnitude keeps its own. AdapterError where one overflows."""
    if not update.scaled:
        raise AdapterError(f"the dtype of {update.family} is not changed; leave it as it is")
    cast = {
        slot: tensor if slot == "magnitude" else cast_to(tensor, getattr(torch, dtype))
        for slot, tensor in update.parameters().items()
    }
    return type(update).from_parameters(cast, scale=update.scale, layout=update.layout)


def from_low_rank(
    op: Operator,
    shape: tuple[int, ...],
    *,
    layout: Layout,
    scale: float,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> LoRA:
    """The LoRA whose delta is `op`, for a base of this shape (m, n, *kernel), written with `scale`.

    AdapterError where `op` is not low rank, or is block diagonal.
    """
    if not isinstance(op, LowRank):
        raise AdapterError("only a low-rank operator makes a LoRA")
    kernel = shape[2:]
    down = torch.empty(1, op.shape[1] // math.prod(kernel), *kernel, dtype=dtype)
    up = torch.empty(op.shape[0], 1, *(1 for _ in kernel), dtype=dtype)
    fitted = LoRA(down, up, scale, layout).fit(op, scale=scale)
    return fitted if bias is None else replace(fitted, up_bias=cast_to(bias.double() / scale, dtype))


def composed(update: LoRA) -> LoRA:
    """The same update with its Tucker core multiplied into `down`: rank and delta stay, the kernel moves."""
    op = update.operator()
    if update.mid is None or not isinstance(op, LowRank):
        return update
    down = op.right.reshape(-1, update.down.shape[1], *update.mid.shape[2:])
    return replace(update, down=cast_to(down, update.down.dtype), mid=None)


def rescaled(update: Update, scale: float) -> Update:
    """The same update written with another scale: its `scaled` slots take the quotient, rounded once unless that is a
    power of two."""
    if update.scale == scale:
        return update
    if not update.scaled:
        raise AdapterError(f"the scale of {update.family} cannot be changed")
    if not scale:
        raise AdapterError("a scale of zero holds no update")
    factor = update.scale / scale
    parameters = {
        slot: cast_to(tensor.double() * factor, tensor.dtype) if slot in update.scaled else tensor
        for slot, tensor in update.parameters().items()
    }
    settings = update.stated_settings()
    return type(update).from_parameters(parameters, scale=scale, layout=update.layout, settings=settings)


def padded(update: Update, rank: int, *, scale: float) -> Update:
    """The same update at a higher rank, with zeros; `scale` is written as it is, `up` takes what that changes."""
    same = rescaled(update, scale)
    direction = same.direction if isinstance(same, DoRA) else same
    if not isinstance(direction, LoRA) or direction.mid is not None or direction.groups > 1:
        raise AdapterError("only plain factors can be padded")
    more = rank - direction.down.shape[0] // direction.layout.experts
    if more < 0:
        raise AdapterError(f"a rank above {rank} cannot be padded to it")
    experts = direction.layout.experts
    if experts > 1:
        down = direction.down.reshape(experts, -1, direction.down.shape[1])
        down = torch.cat([down, down.new_zeros(experts, more, down.shape[2])], dim=1).flatten(0, 1)
        up = direction.up.reshape(direction.up.shape[0], -1, experts)
        up = torch.cat([up, up.new_zeros(up.shape[0], more, experts)], dim=1).flatten(1)
    else:
        down = torch.cat([direction.down, direction.down.new_zeros(more, *direction.down.shape[1:])])
        up = torch.cat([direction.up, direction.up.new_zeros(direction.up.shape[0], more, *direction.up.shape[2:])], 1)
    grown = replace(direction, down=down, up=up)
    return DoRA(grown, same.magnitude) if isinstance(same, DoRA) else grown


def take(update: Update, rows: Tensor, *, part: tuple[int, int] | None = None) -> Update:
    """The update of these rows of the output; AdapterError for a family whose rows do not come apart.

    `part` (index, count) says that they are one of `count` parts: where `up` is block diagonal over the parts, the
    others' components fall away.
    """
    if isinstance(update, DoRA) and update.layout.magnitude_axis == 0:
        direction = take(update.direction, rows, part=part)
        assert isinstance(direction, LoRA)
        flat = update.magnitude.flatten()[rows]
        return DoRA(direction, flat.reshape([-1 if size > 1 else 1 for size in update.magnitude.shape]))
    if not isinstance(update, LoRA) or update.layout.experts > 1 or update.groups > 1 or update.mid is not None:
        raise AdapterError(f"the rows of {update.family} do not come apart; make a plain LoRA of it first")
    up, down = update.up[rows].contiguous(), update.down
    if part is not None and (own := _own_components(update.up, up, rows, part)) is not None:
        up, down = up[:, own].contiguous(), down[own].contiguous()
    bias = None if update.up_bias is None else update.up_bias[rows].contiguous()
    return replace(update, up=up, down=down, up_bias=bias)


def _own_components(whole: Tensor, up: Tensor, rows: Tensor, part: tuple[int, int]) -> slice | None:
    """The components that change only this part, where components are shared out evenly over the parts."""
    index, count = part
    rank = whole.shape[1]
    if rank % count or count == 1:
        return None
    own = slice(index * rank // count, (index + 1) * rank // count)
    elsewhere = torch.ones(whole.shape[0], dtype=torch.bool)
    elsewhere[rows] = False
    others = torch.ones(rank, dtype=torch.bool)
    others[own] = False
    alone = not bool(up[:, others].any()) and not bool(whole[elsewhere][:, own].any())
    return own if alone and bool(up[:, own].any()) else None


def join(parts: Sequence[tuple[Update, Tensor]], outputs: int) -> Update:
    """One update of `outputs` rows from updates of some of them, with zeros where there is none.

    Exact at the same rank where all share `down` and scale; otherwise the components lie side by side.
    """
    first = parts[0][0]
    if any(isinstance(u, DoRA) for u, _ in parts):
        return _join_magnitudes(parts, outputs)
    loras = [(u, rows) for u, rows in parts if isinstance(u, LoRA) and u.down.ndim == 2 and u.layout.experts == 1]
    if len(loras) < len(parts) or not isinstance(first, LoRA):
        raise AdapterError("only plain linear LoRA updates can be joined")
    shared = all(
        u.scale == first.scale and u.down.dtype == first.down.dtype and torch.equal(u.down, first.down)
        for u, _ in loras
    )
    scaled = [(rescaled(u, first.scale), rows) for u, rows in loras]
    dtype = first.up.dtype
    ranks = [u.down.shape[0] for u, _ in loras]
    rank = ranks[0] if shared else sum(ranks)
    up = torch.zeros(outputs, rank, dtype=dtype)
    bias = torch.zeros(outputs, dtype=dtype) if any(u.up_bias is not None for u, _ in loras) else None
    start = 0
    for (u, rows), width in zip(scaled, ranks, strict=True):
        assert isinstance(u, LoRA)
        up[rows, start : start + width] = u.up.to(dtype)
        if bias is not None and u.up_bias is not None:
            bias[rows] = u.up_bias.to(dtype)
        start += 0 if shared else width
    down = first.down if shared else torch.cat([u.down.to(first.down.dtype) for u, _ in loras])
    return replace(first, up=up, down=down, up_bias=bias)


def _join_magnitudes(parts: Sequence[tuple[Update, Tensor]], outputs: int) -> DoRA:
    found = [(u, rows) for u, rows in parts if isinstance(u, DoRA) and u.layout.magnitude_axis == 0]
    if len(found) < len(parts) or sum(len(rows) for _, rows in parts) < outputs:
        raise AdapterError("a magnitude is needed for every row of a joined update")
    direction = join([(u.direction, rows) for u, rows in found], outputs)
    assert isinstance(direction, LoRA)
    magnitude = torch.empty(outputs, dtype=found[0][0].magnitude.dtype)
    for u, rows in found:
        magnitude[rows] = u.magnitude.flatten()
    return DoRA(direction, magnitude)
