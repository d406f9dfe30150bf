"""Are these the same update? Compared by what they do, never by their factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError, naming
from loratools.linalg.inner import frobenius, inner
from loratools.linalg.subspace import overlap
from loratools.linalg.svd import blocks_of, thin_svd
from loratools.operators import Operator, sum_of
from loratools.ops.matching import matched
from loratools.ops.spectra import base_tensor, is_finite_update, nonfinite_error
from loratools.pipeline import ordered_map, worker_count
from loratools.reports.diff import DiffReport, TargetDiff

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.families import Update

# Directions below this share of the largest singular value are rounding noise of 16-bit factors' products.
_NOISE = 1e-7


def diff(
    a: Adapter, b: Adapter, *, base: BaseWeights | None = None, tolerance: float = 1e-6, device: str = "cpu"
) -> DiffReport:
    """Relative error, cosine and subspace overlap of every target that both have, and what only one has.

    Biases that differ by more than the tolerance are listed with the extras, under the target's name and `.bias`.
    Targets are matched by name, across dialects by the name with dots flattened. Raises NeedsBaseError for DoRA without
    a base, AdapterError for NaN and for shapes that differ.
    """
    a.require_weights()
    b.require_weights()
    pairs = {x: y for x, y in matched([a, b]) if x is not None and y is not None}

    def work(pair: tuple[str, str]) -> tuple[str, _Pair]:
        return pair[0], _compared(a, b, pair, base, tolerance, device)

    targets, sums, biases = {}, [], {}
    for name, found in ordered_map(work, pairs.items(), workers=worker_count(device)):
        targets[name] = found.row
        sums.append((found.distance, found.norm_a, found.norm_b))
        if found.bias is not None:
            biases[f"{name}.bias"] = found.bias
    only_a = tuple(t for t in a.entries if t not in pairs)
    only_b = tuple(t for t in b.entries if t not in set(pairs.values()))
    extras = biases | _extras(a, b)
    distance, norm_a, norm_b = (math.hypot(*column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0, 0.0)
    errors = [row.relative_error for row in targets.values()]
    same = not only_a and not only_b and not extras and all(e is not None and e <= tolerance for e in errors)
    total = {
        "targets": len(targets),
        "relative_error": distance / norm_a if norm_a else (0.0 if norm_b == 0.0 else None),
        "norm_a": norm_a,
        "norm_b": norm_b,
    }
    return DiffReport(same, tolerance, targets, only_a, only_b, extras, total, (*a.warnings, *b.warnings))


def diff_target(
    a: Adapter, b: Adapter, pair: tuple[str, str], *, base: BaseWeights | None = None, device: str = "cpu"
) -> TargetDiff:
    """What `diff` says of one pair of targets; raises as it does."""
    return _compared(a, b, pair, base, 0.0, device).row


@dataclass(frozen=True)
class _Pair:
    """One target's row, with the norms that totals are made of."""

    row: TargetDiff
    distance: float
    norm_a: float
    norm_b: float
    bias: str | None  # how the changes of the bias differ


def _compared(
    a: Adapter, b: Adapter, pair: tuple[str, str], base: BaseWeights | None, tolerance: float, device: str
) -> _Pair:
    name_a, name_b = pair
    (update_a, op_a), (update_b, op_b) = (_delta(x, n, base, device) for x, n in ((a, name_a), (b, name_b)))
    if op_a.shape != op_b.shape:
        raise AdapterError(f"{name_a}: {op_a.shape} in one and {op_b.shape} in the other; these adapt different bases")
    distance, norm_a, norm_b = frobenius(sum_of([op_a, -op_b])), frobenius(op_a), frobenius(op_b)
    product = inner(op_a, op_b)
    outputs, inputs = _overlaps(op_a, op_b) if norm_a and norm_b else (None, None)
    error = distance / norm_a if norm_a else (0.0 if norm_b == 0.0 else None)
    cosine = max(-1.0, min(1.0, product / (norm_a * norm_b))) if norm_a and norm_b else None
    row = TargetDiff(a.entries[name_a].rank, b.entries[name_b].rank, error, cosine, outputs, inputs)
    return _Pair(row, distance, norm_a, norm_b, _bias_difference(update_a, update_b, tolerance))


def _delta(adapter: Adapter, target: str, base: BaseWeights | None, device: str) -> tuple[Update, Operator]:
    entry = adapter.entries[target]
    update = entry.read()
    if not is_finite_update(update):
        raise nonfinite_error(target, "see the others with inspect --allow-nonfinite")
    weight = base_tensor(adapter, target, entry, base)
    with naming(target):
        return update, update.operator(weight).to(torch.float64, device)


def _bias_difference(a: Update, b: Update, tolerance: float) -> str | None:
    """How the changes of the base bias differ, where they do; none at all is a change of zero."""
    x, y = a.bias_delta(), b.bias_delta()
    if x is None or y is None:
        found = x if y is None else y
        return None if found is None or not bool(found.any()) else f"only in {'b' if x is None else 'a'}"
    if x.shape != y.shape:
        return "another shape or dtype"
    return None if float((x - y).norm()) <= tolerance * float(x.norm()) else "other values"


def _overlaps(a: Operator, b: Operator) -> tuple[float, float]:
    """Mean overlap of output and of input spaces, over blocks."""
    outputs, inputs = [], []
    for x, y in zip(blocks_of(a), blocks_of(b), strict=True):
        (u1, s1, v1), (u2, s2, v2) = thin_svd(x), thin_svd(y)
        k1, k2 = int((s1 > _NOISE * s1[:1]).sum()), int((s2 > _NOISE * s2[:1]).sum())
        outputs.append(overlap(u1[:, :k1], u2[:, :k2]))
        inputs.append(overlap(v1[:k1].T, v2[:k2].T))
    return sum(outputs) / len(outputs), sum(inputs) / len(inputs)


def _extras(a: Adapter, b: Adapter) -> dict[str, str]:
    """Extra tensors that differ, and how."""
    found = {}
    for key in [*a.extras, *(k for k in b.extras if k not in a.extras)]:
        if key not in b.extras or key not in a.extras:
            found[key] = "only in a" if key in a.extras else "only in b"
        elif a.extras[key].spec != b.extras[key].spec:
            found[key] = "another shape or dtype"
        elif not torch.equal(a.extras[key].read(), b.extras[key].read()):
            found[key] = "other values"
    return found
