"""Comparisons made up in memory, for whatever renders them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from loratools.reports.compare import (
    ComparedTarget,
    CompareReport,
    FineTune,
    Missed,
    OverlapMap,
    PairNumbers,
    UpdateNumbers,
)

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CALM = ("style-lora", "maths-dora", "tuned-whole")
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<b>x</b><a href='javascript:alert(2)'>y</a>&lt;i&gt;",
    "\"quoted', \u202eoverridden\n%{x} $\\alpha$ 🦙 =1+1",
)


def compare_report(
    names: Sequence[str] = CALM, *, layers: int = 30, modules: Sequence[str] = MODULES, rank: int = 16, seed: int = 0
) -> CompareReport:
    """Every name a fine-tune of every matrix; the last one was tuned whole, and the second has DoRA's gains."""
    rng = random.Random(seed)
    targets = {}
    for layer in range(layers):
        for place, module in enumerate(modules):
            updates = {n: _update(rng, i, n, names, layer / layers, place, rank) for i, n in enumerate(names)}
            targets[f"model.layers.{layer}.{module}"] = ComparedTarget(
                layer=str(layer),
                module=module,
                shape=(576, 1536 if place > 4 else 576),
                base_norm=20 + 3 * rng.random(),
                base_values=tuple(9 / math.sqrt(k + 1) for k in range(64)),
                updates=updates,
                pairs=tuple(_pair(rng, a, b) for a, b in _pairs(names)),
            )
    fine_tunes = {n: _fine_tune(i, n, names, targets, rank) for i, n in enumerate(names)}
    return CompareReport(
        base="models/base",
        top_k=16,
        epsilon=0.5,
        max_overlap_rank=16,
        fine_tunes=fine_tunes,
        targets=targets,
        pairs=tuple(_pair(rng, a, b) for a, b in _pairs(names)),
        overlap_maps=tuple(
            _map(rng, a, b, module, side, layers)
            for a, b in _pairs(names)
            for module in modules[:3]
            for side in ("output", "input")
        ),
        skipped={"model.embed_tokens": "a table of embeddings"},
        warnings=("2 targets are of another base",),
    )


def gaps(report: CompareReport) -> CompareReport:
    """The same with None wherever one is allowed, a NaN and infinities."""
    targets = {
        name: replace(
            target,
            updates={
                n: replace(
                    u, rank=0, gain=None, logit_growth=None, missed=None, relative_norm=math.inf, stable_rank=math.nan
                )
                for n, u in target.updates.items()
            },
            pairs=tuple(PairNumbers(p.a, p.b, None, None, None, None) for p in target.pairs),
        )
        for name, target in report.targets.items()
    }
    maps = tuple(replace(m, values=tuple((None,) * len(row) for row in m.values)) for m in report.overlap_maps)
    pairs = tuple(PairNumbers(p.a, p.b, None, None, None, None) for p in report.pairs)
    tunes = {name: replace(tune, missed=None) for name, tune in report.fine_tunes.items()}
    return replace(report, targets=targets, overlap_maps=maps, pairs=pairs, fine_tunes=tunes)


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


def _update(
    rng: random.Random, index: int, name: str, names: Sequence[str], depth: float, place: int, rank: int
) -> UpdateNumbers:
    whole = index == len(names) - 1
    decay = (0.04 if whole else 0.16 + 0.1 * index) * (0.6 + 0.5 * depth + 0.4 * rng.random())
    size = (0.4 + index) * (0.3 + depth * (1.2 - 0.15 * place) + 0.4 * rng.random())
    spectrum = tuple(size * math.exp(-decay * k) for k in range(48 if whole else rank))
    squares = [s * s for s in spectrum]
    norm = math.sqrt(sum(squares))
    shares = [s / sum(spectrum) for s in spectrum]
    best = 0.2 + 0.3 * rng.random() * depth
    error = best + (1 - best) * (0.3 + 0.2 * rng.random())
    return UpdateNumbers(
        family="full" if whole else "dora" if index == 1 else "lora",
        rank=len(spectrum),
        norm=norm,
        relative_norm=norm / 22,
        spectrum=spectrum,
        effective_rank=math.exp(-sum(p * math.log(p) for p in shares)),
        stable_rank=sum(squares) / max(squares),
        energy_left=min(1.0, 0.1 + 0.2 * index + 0.25 * rng.random()),
        energy_right=min(1.0, 0.05 + 0.15 * index + 0.2 * rng.random()),
        share=norm * norm / 1000,
        left_intruders=0 if whole else rng.choice((0, 0, 0, 1, 2)) + (depth > 0.8),
        right_intruders=0 if whole else rng.choice((0, 0, 1)),
        gain=(0.9, 1.0, 1.1 + rng.random() / 10) if index == 1 else None,
        logit_growth=1 + 0.3 * size * rng.random() if place < 3 else None,
        missed=None if whole else Missed(names[-1], rank, error, best, (best + error) / 2),
    )


def _pair(rng: random.Random, a: str, b: str) -> PairNumbers:
    return PairNumbers(a, b, 0.4 * rng.random() - 0.1, 1 + rng.random(), 0.3 * rng.random(), 0.2 * rng.random())


def _map(rng: random.Random, a: str, b: str, module: str, side: str, layers: int) -> OverlapMap:
    values = [
        [min(1.0, 0.05 * rng.random() + 0.5 * math.exp(-abs(i - j) / 1.5)) for j in range(layers)]
        for i in range(layers)
    ]
    rows: list[tuple[float | None, ...]] = [tuple(row) for row in values]
    if layers > 2:
        rows[1] = (None,) * layers
    return OverlapMap(a, b, module, side, tuple(map(str, range(layers))), tuple(rows))


def _fine_tune(index: int, name: str, names: Sequence[str], targets: dict[str, ComparedTarget], rank: int) -> FineTune:
    updates = [t.updates[name] for t in targets.values()]
    total = sum(u.norm**2 for u in updates)
    mean = lambda values: sum(values) / len(updates)  # noqa: E731
    shares: dict[str, dict[str, float]] = {"layer": {}, "module": {}}
    for target in targets.values():
        for kind, key in (("layer", target.layer), ("module", target.module)):
            shares[kind][key] = shares[kind].get(key, 0.0) + target.updates[name].norm ** 2 / total
    whole = index == len(names) - 1
    length = len(updates[0].spectrum)
    return FineTune(
        path=f"adapters/{name}",
        kind="full" if whole else "adapter",
        families=(updates[0].family,),
        targets=len(targets),
        rank_min=length,
        rank_max=length,
        norm=math.sqrt(total),
        relative_norm=math.sqrt(total / sum(t.base_norm**2 for t in targets.values())),
        mean_effective_rank=mean(u.effective_rank for u in updates),
        mean_stable_rank=mean(u.stable_rank for u in updates),
        mean_energy_left=mean(u.energy_left for u in updates),
        mean_energy_right=mean(u.energy_right for u in updates),
        left_intruders=sum(u.left_intruders for u in updates),
        right_intruders=sum(u.right_intruders for u in updates),
        spectrum=tuple(math.sqrt(mean(u.spectrum[k] ** 2 for u in updates)) for k in range(length)),
        layers=shares["layer"],
        modules=shares["module"],
        missed=None if whole else Missed(names[-1], rank, 0.7, 0.41, 0.58),
    )
