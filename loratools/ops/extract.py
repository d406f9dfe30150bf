"""A LoRA from a fully fine-tuned checkpoint: the best low-rank approximation of tuned - base (PHLoRA)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.adapter import Adapter, Entry, Record
from loratools.errors import AdapterError, UnchangedError
from loratools.families.base import Layout
from loratools.families.full import Full
from loratools.formats.base import Order as Request
from loratools.formats.base import Part
from loratools.formats.peft import Peft
from loratools.ops.merge import Merge, fit_jobs
from loratools.ops.merge_output import draft_of
from loratools.ops.reorder import SUSPICIOUS, Order, candidates, matched_rows
from loratools.ranks import Fixed, Limits, Policy
from loratools.reports.extract import ExtractedTarget, ExtractReport
from loratools.reports.merge import totals
from loratools.storage.atomic import printable
from loratools.storage.base import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.base_weights import BaseWeights

_TABLES = ("embed", "wte", "wpe", "shared")  # in the last part of the names of embedding tables
_VOCABULARY = (*_TABLES, "lm_head")
_TRANSPOSED = {"gpt2"}  # model types whose matrices are (inputs, outputs)
_UNRELATED = 0.9  # of ||tuned - base|| / ||base||: sqrt(2) for weights that have nothing to do with each other
_FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class Change:
    """Of one parameter: the Frobenius norms of the base, of the change, and of rounding to the tuned dtype."""

    base: float
    change: float
    noise: float

    @property
    def relative(self) -> float:
        return self.change / self.base if self.base else math.inf if self.change else 0.0


@dataclass(frozen=True)
class Differences:
    """Two checkpoints apart: `adapter` holds the changed matrices, lazily, as full differences."""

    adapter: Adapter
    changes: Mapping[str, Change]  # of the adapter's targets
    left_out: Mapping[str, Change]
    unchanged: int
    sha256: str  # of all tensors compared, in turn
    reordered: tuple[str, ...] = ()  # parameters whose rows or columns lay in another order


def differences(base: BaseWeights, tuned: BaseWeights, *, step: Callable[[], None] | None = None) -> Differences:
    """What fine-tuning changed, by parameter; every tensor of both is read once, one pair at a time.

    Channels in another order, as S2FT leaves them, are put back first. `step` is called after each parameter. Raises
    AdapterError where the two are no versions of one model: other shapes, another vocabulary, or weights that
    are not related.
    """
    pairs = _pairs(base, tuned)
    digest = hashlib.sha256()
    changes: dict[str, Change] = {}
    known: dict[str, Tensor] = {}
    for name, other in pairs.items():
        before, after = base.source.read(other), tuned.source.read(name)
        for tensor in (before, after):
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        changes[name] = _measured(before, after, name)
        if changes[name].relative > SUSPICIOUS and (order := matched_rows(before, after)) is not None:
            known[name.rpartition(".")[0]] = order
        if step is not None:
            step()
    orders = _reordered(base, tuned, pairs, changes, known) if known else {}
    changes |= {name: change for name, (_, change) in orders.items()}
    is_matrix = {name: _is_matrix(name, tuned.source.specs[name].shape) for name in changes}
    matrices = {name: change for name, change in changes.items() if change.change and is_matrix[name]}
    left = {name: change for name, change in changes.items() if change.change and not is_matrix[name]}
    compared = sum(is_matrix.values())
    unrelated = sum(change.relative > _UNRELATED for change in matrices.values())
    if unrelated * 2 > compared:
        raise AdapterError(
            f"{printable(tuned.source.path)}: {unrelated} of {compared} matrices have nothing in common with those of "
            f"{printable(base.source.path)}; is it the right base?"
        )
    transposed = tuned.config.get("model_type") in _TRANSPOSED
    entries = {
        name.removesuffix(".weight"): _entry(
            base, tuned, name, pairs[name], transposed, orders[name][0] if name in orders else Order()
        )
        for name in matrices
    }
    parts = {t: Part(("down", "up"), e.layout, e.base_shape) for t, e in entries.items()}
    origin = base.config.get("_name_or_path")
    kept = {"base_model_name_or_path": origin if isinstance(origin, str) else None}
    adapter = Adapter(Peft.compose(parts, Request(config=kept)), entries, {}, {})
    of_targets = {name.removesuffix(".weight"): change for name, change in matrices.items()}
    unchanged = len(changes) - len(matrices) - len(left)
    return Differences(adapter, of_targets, left, unchanged, digest.hexdigest(), tuple(orders))


def _reordered(
    base: BaseWeights,
    tuned: BaseWeights,
    pairs: Mapping[str, str],
    changes: Mapping[str, Change],
    known: Mapping[str, Tensor],
) -> dict[str, tuple[Order, Change]]:
    """Parameters that are nearer to the base in another order, with that order and the change that is left."""
    found: dict[str, tuple[Order, Change]] = {}
    for name, change in changes.items():
        module, _, leaf = name.rpartition(".")
        shape = tuned.source.specs[name].shape
        own = [Order(rows=known[module])] if module in known and leaf == "weight" else []
        tried = own or (candidates(name, shape, known) if change.relative > SUSPICIOUS else [])
        if not tried:
            continue
        before, after = base.source.read(pairs[name]), tuned.source.read(name)
        best = change
        for order in tried:
            left = _measured(before, order.restored(after), name)
            if left.change < 0.5 * best.change:
                found[name], best = (order, left), left
    return found


def extract(
    found: Differences,
    rank: int | Policy,
    *,
    limits: Limits = Limits(),
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Adapter, ExtractReport]:
    """The PEFT LoRA nearest to what fine-tuning changed (PHLoRA, arXiv 2509.10971).

    Each matrix gets the Eckart-Young optimum of tuned - base at its rank, for large ones at low rank within a few
    thousandths (a randomised SVD), in the dtype of the tuned weight; alpha = r. Changes of norms, biases and embedding
    tables are no LoRA and are listed. Raises UnchangedError where no matrix differs.
    """
    adapter = found.adapter
    if not adapter.entries:
        raise UnchangedError("no matrix differs between the two checkpoints, so that there is nothing to extract")
    policy = Fixed(rank) if isinstance(rank, int) else rank
    draft, jobs = draft_of([adapter], [(target,) for target in adapter.entries], (), None)
    arguments = {"policy": repr(policy), "seed": seed} | ({} if limits == Limits() else {"limits": repr(limits)})
    record = Record("extract", arguments, lambda: found.sha256)
    options = Merge(seed=seed, device=device)
    fitted = fit_jobs(replace(draft, record=record), [adapter], (1.0,), jobs, policy, limits, options)
    targets = {
        target: ExtractedTarget(
            row.rank_out, change.relative, row.relative_error, change.noise / change.change, row.bytes
        )
        for target, row in fitted.targets.items()
        for change in (found.changes[target],)
    }
    warnings = [*fitted.notes]
    if found.reordered:
        warnings.append(
            f"the channels of {len(found.reordered)} parameters lay in another order, as S2FT leaves them, and were "
            f"put back: the adapter is for the base as it is; first: {found.reordered[0]}"
        )
    if found.left_out:
        worst = max(found.left_out, key=lambda name: found.left_out[name].relative)
        warnings.append(
            f"{len(found.left_out)} changed parameters are no matrices and stay out of the LoRA; most of all {worst}, "
            f"by {100 * found.left_out[worst].relative:.3g} %"
        )
    if noisy := [t for t, row in targets.items() if row.noise > 0.5]:
        warnings.append(f"{len(noisy)} changes are hardly above the rounding of their dtype; first: {noisy[0]}")
    if lossy := [t for t, row in targets.items() if row.relative_error > 0.5]:
        warnings.append(f"the relative error is above 0.5 for {len(lossy)} targets at their rank; first: {lossy[0]}")
    total = totals(fitted.targets, fitted.squares, fitted.adapter.nbytes)
    left = {name: change.relative for name, change in found.left_out.items()}
    return fitted.adapter, ExtractReport(targets, left, found.unchanged, total, tuple(warnings))


def _pairs(base: BaseWeights, tuned: BaseWeights) -> dict[str, str]:
    """Tuned parameter -> base parameter; AdapterError for shapes that differ, and for other names."""
    pairs: dict[str, str] = {}
    missing = []
    for name, spec in tuned.source.specs.items():
        other = base.name_of(name)
        if other is None:
            missing.append(name)
            continue
        shape = base.source.specs[other].shape
        if shape != spec.shape:
            where = f"{printable(tuned.source.path)}: {name} is {spec.shape}, {shape} in the base"
            if len(shape) == 2 and shape[1:] == spec.shape[1:] and _is_of_words(name):
                raise AdapterError(f"{where}: the vocabularies differ; resize one to the other's rows first")
            raise AdapterError(f"{where}; is it the right base?")
        if spec.dtype not in _FLOATS or base.source.specs[other].dtype not in _FLOATS:
            raise AdapterError(f"{name}: is held as {spec.dtype}; give checkpoints of 16, 32 or 64 bits")
        pairs[name] = other
    if len(missing) * 2 > len(tuned.source.specs) or not pairs:
        raise AdapterError(
            f"{printable(tuned.source.path)}: {len(missing)} of {len(tuned.source.specs)} parameters are not in "
            f"{printable(base.source.path)}, such as {missing[0]}; is it the right base?"
        )
    if missing := [name for name in missing if not _is_of_words(name)]:  # an output that was untied is the embedding
        raise AdapterError(f"{missing[0]}: is not in {printable(base.source.path)}; is it the right base?")
    return pairs


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) in (2, 4) and name.endswith(".weight") and not _is_table(name)


def _is_table(name: str) -> bool:
    return any(word in name.removesuffix(".weight").rpartition(".")[2] for word in _TABLES)


def _is_of_words(name: str) -> bool:
    return any(word in name.removesuffix(".weight").rpartition(".")[2] for word in _VOCABULARY)


def _measured(before: Tensor, after: Tensor, name: str) -> Change:
    for tensor in (before, after):
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{name}: holds NaN or infinity; is a checkpoint damaged?")
    change = float((after.double() - before.double()).norm())
    return Change(float(before.double().norm()), change, _rounding(after) if change else 0.0)


def _rounding(tensor: Tensor) -> float:
    """The norm to expect of what rounding to the dtype adds: a uniform error of half a unit in the last place."""
    mantissas, exponents = torch.frexp(tensor.double())
    steps = torch.ldexp(torch.ones_like(mantissas), exponents - 1).masked_fill_(tensor == 0, 0.0)
    return float(steps.norm()) * torch.finfo(tensor.dtype).eps / math.sqrt(12)


def _entry(base: BaseWeights, tuned: BaseWeights, name: str, other: str, transposed: bool, order: Order) -> Entry:
    spec = tuned.source.specs[name]
    layout = Layout(transposed=transposed and len(spec.shape) == 2)
    read: Callable[[], Full] = partial(_difference, base, tuned, name, other, layout, order)
    return Entry(Full, {"diff": TensorSpec(spec.dtype, spec.shape)}, layout, 0, 1.0, read)


def _difference(base: BaseWeights, tuned: BaseWeights, name: str, other: str, layout: Layout, order: Order) -> Full:
    after = order.restored(tuned.source.read(name))
    return Full(after.double() - base.source.read(other).double(), 1.0, layout)
