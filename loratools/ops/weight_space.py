"""An adapter carried from one base model to another by their weights, or by what both compute; nothing is trained.

A delta B A of a weight W1 = U1 S1 V1^T becomes P_out B A P_in^T for W2, with orthonormal P_out and P_in: from singular
vector to singular vector, P_out = U2 U1^T and P_in = V2 V1^T, or what turns the activations of one model into those of
the other. It is a baseline to judge training by, not a substitute: nothing says that two models use alike what is alike
in their weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from loratools._lazy import torch
from loratools.adapter import Adapter, entry_of
from loratools.errors import AdapterError, UnchangedError, naming
from loratools.families.base import Layout
from loratools.families.lora import LoRA
from loratools.families.regroup import from_low_rank
from loratools.formats.base import Order, Part
from loratools.formats.peft import Peft
from loratools.linalg.alignment import Isometry, agreement, between_bases, carried, projections
from loratools.linalg.inner import frobenius
from loratools.linalg.svd import truncate
from loratools.operators import LowRank
from loratools.ops.base_spectra import Search
from loratools.ops.depth import Origin, Pairing, pairings
from loratools.ops.initial import refuse_mutated
from loratools.ops.paired_weights import PairedWeights, Weight
from loratools.ops.spectra import is_finite_update, nonfinite_error
from loratools.reports.weight_transfer import CarriedTarget, WeightTransferReport
from loratools.storage.base import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update

Align = Literal["none", "bases", "activations"]
ALIKE = 0.5  # of the leading singular spaces: from here on the two models have one ancestor, and common coordinates
_WORDS = ("lm_head", "embed_out")  # their outputs are words
_LITTLE = 0.5  # of a delta that arrives: worth a warning below


@dataclass(frozen=True, eq=False)
class Maps:
    """How outputs and inputs of a module turn into those of another, and how well they agree, from 0 to 1."""

    outputs: Isometry
    inputs: Isometry
    agreement: float


MapsOf = Callable[[str, str], Maps]  # of a module of the one model and one of the other


def transfer_weights(
    adapter: Adapter,
    source: BaseWeights,
    destination: BaseWeights,
    *,
    maps: MapsOf | Literal["none", "bases"] = "bases",
    search: Search = Search(),
    step: Callable[[], None] | None = None,
) -> tuple[Adapter, WeightTransferReport]:
    """The adapter of `source` as one of `destination`, in PEFT's dialect, and what became of each target.

    By names and depth as `pairings` tells. With "bases", equal weights keep their factors bit for bit; weights whose
    leading singular spaces agree, those of one ancestor, keep the delta within the singular spaces of the new one; all
    others have it carried from singular vector to singular vector, cut to what both have. A function gives `Maps` of
    activations. "none" copies where shapes are equal. What is carried keeps its size relative to the weight; what falls
    away is not made up for. Factors never become m x n. `step` is called for each pairing. Raises UnchangedError where
    nothing can be carried, AdapterError for weights or factors that are not finite.
    """
    adapter.require_weights()
    refuse_mutated(adapter, "the factors belong to the base that they were taken out of")
    found, dropped = pairings(adapter, source, destination)
    weights = PairedWeights(adapter, source, destination, search)
    updates: dict[str, LoRA] = {}
    targets: dict[str, CarriedTarget] = {}
    # of one kind of module after the other, neighbouring layers share what is known of a weight
    for pairing in found if callable(maps) else sorted(found, key=lambda p: re.sub(r"\d+", "N", p.module)):
        if step is not None:
            step()
        known = tuple(o for o in pairing.origins if not _refused(adapter, o.target, dropped))
        if not known:
            continue
        with naming(pairing.module):
            made = _carried(adapter, replace(pairing, origins=known), weights, maps)
        if isinstance(made, str):
            dropped |= {o.target: made for o in known}
        else:
            updates[pairing.module], targets[pairing.module] = made
    used = {t for row in targets.values() for t in row.origins}
    dropped = {t: why for t, why in dropped.items() if t not in used} | _besides(adapter, targets)
    if not targets:
        name, why = next(iter(dropped.items()), ("the adapter", "it has no targets"))
        raise UnchangedError(f"nothing can be carried over; {name}: {why}")
    names = [pairing.module for pairing in found if pairing.module in targets]
    updates, targets = {t: updates[t] for t in names}, {t: targets[t] for t in names}
    align = maps if isinstance(maps, str) else "activations"
    result = _composed(adapter, updates, destination, align)
    return result, WeightTransferReport(
        align, targets, dropped, result.nbytes, (*adapter.warnings, *_warnings(targets, dropped))
    )


def module_pairs(adapter: Adapter, source: BaseWeights, destination: BaseWeights) -> list[tuple[str, str]]:
    """The pairs of modules that `transfer_weights` asks maps for, in that order."""
    found, dropped = pairings(adapter, source, destination)
    return [
        (origin.module, pairing.module)
        for pairing in found
        for origin in pairing.origins
        if not _refused(adapter, origin.target, dropped)
    ]


def _refused(adapter: Adapter, target: str, dropped: dict[str, str]) -> bool:
    """Whether a target is no product of two factors of one matrix, with the reason in `dropped`."""
    entry = adapter.entries[target]
    why = None
    if entry.layout.embedding:
        why = "an embedding table, whose rows are words of a vocabulary"
    elif entry.needs_base or not entry.is_factored or entry.layout.experts > 1:
        why = f"a {entry.family.family} is no product of two factors of one matrix; convert it to LoRA first"
    elif entry.base_shape is None or len(entry.base_shape) != 2:
        why = "the module is no matrix"
    if why is not None:
        dropped[target] = why
    return why is not None


@dataclass(frozen=True, eq=False)
class _Part:
    """What one target brings: its delta for the new weight, and how much of it that is."""

    update: Update
    change: LowRank
    method: str
    agreement: float | None
    square: float  # of what was there, times its share
    arrived: float  # of what is left of that
    relative: float


def _carried(
    adapter: Adapter, pairing: Pairing, weights: PairedWeights, maps: MapsOf | Literal["none", "bases"]
) -> tuple[LoRA, CarriedTarget] | str:
    """The update of one module, or why there is none."""
    first = pairing.origins[0].target
    after = weights.after(pairing.module, first)
    parts = []
    for origin in pairing.origins:
        part = _part(adapter, origin, pairing.module, weights, after, maps)
        if isinstance(part, str):
            return part
        parts.append(part)
    rank = max(adapter.entries[o.target].rank for o in pairing.origins)
    layout = Layout(transposed=adapter.entries[first].layout.transposed)
    method, share = parts[0].method, 1.0
    alone = len(parts) == 1 and pairing.origins[0].share == 1
    if alone and method in ("same", "copy") and isinstance(parts[0].update, LoRA):
        made = replace(parts[0].update, layout=layout)
    else:
        whole = _joined([part.change for part in parts])
        best = whole if whole.rank <= rank else truncate(whole, rank, method="exact").operator
        assert isinstance(best, LowRank)  # as `whole` is
        norm = frobenius(whole)
        share = (frobenius(best) / norm) ** 2 if norm else 1.0
        dtype = getattr(torch, DTYPES[adapter.usual_dtype][0])
        made = from_low_rank(best, tuple(after.matrix.shape), layout=layout, scale=1.0, dtype=dtype)
        if not is_finite_update(made):
            raise AdapterError(f"the result overflows {adapter.usual_dtype}")
    square, arrived = math.fsum(part.square for part in parts), math.fsum(part.arrived for part in parts)
    known = [part.agreement for part in parts if part.agreement is not None]
    rows, columns = weights.before(first).matrix.shape
    return made, CarriedTarget(
        {o.target: o.share for o in pairing.origins},
        method,
        entry_of(made).rank,
        (rows, columns),
        (after.matrix.shape[0], after.matrix.shape[1]),
        sum(known) / len(known) if known else None,
        min(1.0, round(arrived / square * share, 12)) if square else 1.0,  # no more digits than rounding leaves
        math.hypot(*(part.relative for part in parts)),
        frobenius(made.operator()) / after.norm if after.norm else 0.0,
    )


def _part(
    adapter: Adapter,
    origin: Origin,
    module: str,
    weights: PairedWeights,
    after: Weight,
    maps: MapsOf | Literal["none", "bases"],
) -> _Part | str:
    """What one target brings, or why nothing can be carried."""
    update, before = adapter[origin.target], weights.before(origin.target)
    if not is_finite_update(update):
        raise nonfinite_error(origin.target, "leave it out")
    change = update.operator()
    if not isinstance(change, LowRank) or change.shape != tuple(before.matrix.shape):
        return "its factors do not fit the weight of its own base"
    if after.matrix.ndim != 2:
        return f"{module} of the other model is no matrix"
    if module.rpartition(".")[2] in _WORDS and before.matrix.shape != after.matrix.shape:
        return "the vocabularies differ"
    moved = _moved(origin, module, change, before, after, maps)
    if isinstance(moved, str):
        return moved
    part, method, agreed = moved
    size = origin.share * frobenius(change)
    left = origin.share * frobenius(part) / _ratio(method, before, after)
    relative = size / before.norm if before.norm else 0.0
    return _Part(update, part * origin.share, method, agreed, size**2, left**2, relative)


def _moved(
    origin: Origin,
    module: str,
    change: LowRank,
    before: Weight,
    after: Weight,
    maps: MapsOf | Literal["none", "bases"],
) -> tuple[LowRank, str, float | None] | str:
    """The delta for the other weight, how it came there, and the agreement; or why there is none."""
    alike = before.matrix.shape == after.matrix.shape
    if maps == "none":
        return (
            (change, "copy", None) if alike else f"{module} of the other model has another shape; use another --align"
        )
    if alike and torch.equal(before.matrix, after.matrix):
        return change, "same", 1.0
    if maps != "bases":
        found = maps(origin.module, module)
        sides = found.outputs, found.inputs
        method = "activations"
        agreed: float | None = found.agreement
        expected = (len(sides[0].right), len(sides[1].right)), (len(sides[0].left), len(sides[1].left))
        if expected != (change.shape, tuple(after.matrix.shape)):
            raise AdapterError(
                f"{module}: activations of {expected} do not fit the weights; are these the same models?"
            )
    else:
        one, other = before.basis(), after.basis()
        measured = agreement(one, other)
        method = "projected" if measured is not None and measured >= ALIKE else "bases"
        sides = projections(other) if method == "projected" else between_bases(one, other)
        agreed = measured
    moved = carried(change.to(torch.float64), Isometry(*_double(sides[0])), Isometry(*_double(sides[1])))
    return moved * _ratio(method, before, after), method, agreed


def _ratio(method: str, before: Weight, after: Weight) -> float:
    """What keeps the size of a delta relative to its weight; 1 where it stays in its own coordinates."""
    return after.norm / before.norm if method in ("bases", "activations") and before.norm and after.norm else 1.0


def _double(isometry: Isometry) -> tuple[Tensor, Tensor]:
    return isometry.left.double().cpu(), isometry.right.double().cpu()


def _joined(parts: Sequence[LowRank]) -> LowRank:
    """The sum, as one product of factors side by side."""
    if len(parts) == 1:
        return parts[0]
    left = torch.cat([part.left.double() * part.scale for part in parts], dim=1)
    return LowRank(left, torch.cat([part.right.double() for part in parts]))


def _composed(adapter: Adapter, updates: Mapping[str, LoRA], destination: BaseWeights, align: str) -> Adapter:
    parts = {
        t: Part(tuple(u.parameters()), u.layout, entry_of(u).base_shape, entry_of(u).rank, u.scale)
        for t, u in updates.items()
    }
    named = destination.config.get("_name_or_path")
    kept = {"base_model_name_or_path": named if isinstance(named, str) else None}
    entries = {t: entry_of(u) for t, u in updates.items()}
    made = Adapter(Peft.compose(parts, Order(config=kept)), entries, {}, {}, (), adapter.origin)
    recorded = made.recorded("transfer", {"weights_only": True, "align": align})
    return replace(recorded, origin=None)


def _besides(adapter: Adapter, targets: Mapping[str, CarriedTarget]) -> dict[str, str]:
    """What the adapter holds beside factors of matrices, which nothing carries."""
    found = dict.fromkeys(adapter.loose_extras, "no update of a matrix") | dict(adapter.unsupported)
    for row in targets.values():
        for target in row.origins if row.method not in ("same", "copy") else ():
            if "up_bias" in adapter.entries[target].specs:
                found[f"{target}, its bias"] = "no update of a matrix"
    return found


def _warnings(targets: Mapping[str, CarriedTarget], dropped: Mapping[str, str]) -> list[str]:
    found = []
    if dropped:
        name, why = next(iter(dropped.items()))
        found.append(f"{len(dropped)} targets are not in the new adapter; first: {name}: {why}")
    little = [t for t, row in targets.items() if row.kept < _LITTLE]
    if little:
        found.append(f"less than half of the squared norm of {len(little)} targets arrived; first: {little[0]}")
    arbitrary = sum(row.method == "bases" for row in targets.values())
    if arbitrary:
        found.append(
            f"{arbitrary} targets went from singular vector to singular vector of weights that share no coordinates, "
            "which seldom helps: measure it, and compare with --align activations or with training"
        )
    return found
