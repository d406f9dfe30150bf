"""What the numbers of all matrices come to: pure functions of the records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from loratools.ops.inspect import depth
from loratools.reports.compare import ComparedTarget, FineTune, Missed, PairNumbers, UpdateNumbers

Targets = Mapping[str, ComparedTarget]


def with_shares(targets: Targets) -> dict[str, ComparedTarget]:
    """Each update's share of the squared norm of its whole fine-tune; 0 where that is zero."""
    norms = {name: _norm(u.norm for _, u in _updates(targets, name)) for name in _names(targets)}
    return {
        parameter: replace(
            t,
            updates={n: replace(u, share=(u.norm / norms[n]) ** 2 if norms[n] else 0.0) for n, u in t.updates.items()},
        )
        for parameter, t in targets.items()
    }


def fine_tune(path: str, kind: str, name: str, targets: Targets, reference: str | None) -> FineTune:
    """One fine-tune over all matrices that it changes, of which there is one at least; shares are already known."""
    rows = _updates(targets, name)
    updates = [u for _, u in rows]
    norm, base = _norm(u.norm for u in updates), _norm(t.base_norm for t, _ in rows)
    ranks = [u.rank for u in updates]
    layers: dict[str, float] = {}
    modules: dict[str, float] = {}
    for target, update in rows:
        layers[target.layer] = layers.get(target.layer, 0.0) + update.share
        modules[target.module] = modules.get(target.module, 0.0) + update.share
    missed = None if reference in (None, name) else _missed(rows, str(reference))
    return FineTune(
        path=path,
        kind=kind,
        families=tuple(sorted({u.family for u in updates})),
        targets=len(rows),
        rank_min=min(ranks),
        rank_max=max(ranks),
        norm=norm,
        relative_norm=norm / base if base else None,
        mean_effective_rank=_mean([u.effective_rank for u in updates]),
        mean_stable_rank=_mean([u.stable_rank for u in updates]),
        mean_energy_left=_mean([u.energy_left for u in updates]),
        mean_energy_right=_mean([u.energy_right for u in updates]),
        left_intruders=sum(u.left_intruders for u in updates),
        right_intruders=sum(u.right_intruders for u in updates),
        spectrum=_mean_spectrum([u.spectrum for u in updates]),
        layers={layer: layers[layer] for layer in sorted(layers, key=depth)},
        modules=modules,
        missed=missed,
        untouched=None if reference in (None, name) else _untouched(targets, name, str(reference)),
    )


def pairs_over_all(targets: Targets, names: Sequence[str]) -> tuple[PairNumbers, ...]:
    """Every pair over the matrices that both change; None for all that is not defined, as where there are none."""
    return tuple(_pair(targets, a, b) for a, b in combinations(names, 2))


def _pair(targets: Targets, a: str, b: str) -> PairNumbers:
    products, distances, norms_a, norms_b = [], [], [], []
    outputs, inputs, ranks = [], [], []
    for target in targets.values():
        for pair in target.pairs:
            if (pair.a, pair.b) != (a, b):
                continue
            norm_a, norm_b = target.updates[a].norm, target.updates[b].norm
            norms_a.append(norm_a)
            norms_b.append(norm_b)
            products.append((pair.cosine or 0.0) * norm_a * norm_b)
            distances.append(norm_b if pair.relative_distance is None else pair.relative_distance * norm_a)
            if pair.output_overlap is not None and pair.input_overlap is not None:
                outputs.append(pair.output_overlap)
                inputs.append(pair.input_overlap)
                ranks.append(pair.overlap_rank or 0)
    whole_a, whole_b = _norm(norms_a), _norm(norms_b)
    cosine = math.fsum(products) / (whole_a * whole_b) if whole_a and whole_b else None
    relative = _norm(distances) / whole_a if whole_a else None if whole_b or not distances else 0.0
    return PairNumbers(
        a=a,
        b=b,
        cosine=None if cosine is None else max(-1.0, min(1.0, cosine)),
        relative_distance=relative,
        output_overlap=_mean(outputs) if outputs else None,
        input_overlap=_mean(inputs) if inputs else None,
        overlap_rank=max(ranks, default=None),
    )


def _missed(rows: Sequence[tuple[ComparedTarget, UpdateNumbers]], reference: str) -> Missed | None:
    found = [(t.updates[reference].norm, u.missed) for t, u in rows if u.missed is not None]
    whole = _norm(norm for norm, _ in found)
    if not whole:
        return None
    return Missed(
        of=reference,
        rank=max(m.rank for _, m in found),
        error=_norm(norm * m.error for norm, m in found) / whole,
        best_error=_norm(norm * m.best_error for norm, m in found) / whole,
        space_error=_norm(norm * m.space_error for norm, m in found) / whole,
    )


def _untouched(targets: Targets, name: str, reference: str) -> float:
    return min(
        1.0, math.fsum(t.updates[reference].share for t, _ in _updates(targets, reference) if name not in t.updates)
    )


def _updates(targets: Targets, name: str) -> list[tuple[ComparedTarget, UpdateNumbers]]:
    return [(t, t.updates[name]) for t in targets.values() if name in t.updates]


def _names(targets: Targets) -> dict[str, None]:
    return dict.fromkeys(name for t in targets.values() for name in t.updates)


def _mean_spectrum(spectra: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Root mean square over all spectra, value by value; a shorter one goes on with zeros."""
    length = max(map(len, spectra))
    columns = ([s[i] for s in spectra if i < len(s)] for i in range(length))
    return tuple(_norm(column) / math.sqrt(len(spectra)) for column in columns)


def _norm(values: Iterable[float]) -> float:
    return math.hypot(*values)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
