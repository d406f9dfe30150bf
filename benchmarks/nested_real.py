"""One adapter for many ranks on a real task: LoRA, DyLoRA and MatryoshkaLoRA on the same budget, cut to every rank.

What an objective came to lies in the cache of benchmarks: an interrupted run goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contestants import CACHE, device, of_size, table
from number_words import BATCH, fresh, load_real, reason_missing, scores, train

if TYPE_CHECKING:
    from real.smollm2 import RealModel

    from loratools.adapter import Adapter
    from loratools.training.nested import Objective, Scaling

Cut = Callable[[Any, int], Any]

RANK, STEPS, RATE, ROWS = 16, 100, 1e-3, 128


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    title = "# Nested training\n\n"
    if reason := reason_missing():
        return f"{title}Skipped: {reason}."
    with tempfile.TemporaryDirectory() as folder:
        steps, n_rows = of_size((4, 16), (STEPS, ROWS), (700, 256), quick=quick)
        return title + _measured(Path(folder), steps=steps, n_rows=n_rows)


def _measured(folder: Path, *, steps: int, n_rows: int) -> str:
    from loratools import __version__
    from loratools.ops.aurac import aurac

    ranks = [2**i for i in range(RANK.bit_length()) if 2**i <= RANK]
    settings = json.dumps([__version__, device(), steps, n_rows, RANK, RATE])
    cache = CACHE / "nested_real" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    real: RealModel | None = None
    rows, areas = [], []
    for objective, scaling in (("lora", "keep"), ("dylora", "keep"), ("matryoshka", "keep"), ("matryoshka", "sqrt")):
        place = cache / f"{objective}, {scaling}.json"
        if not place.is_file():
            if real is None:
                real = load_real(folder, n_rows=n_rows)
            scored = _scored(real, folder, objective, scaling, ranks, steps)
            place.with_suffix(".tmp").write_text(json.dumps(scored), encoding="utf-8")
            place.with_suffix(".tmp").replace(place)
        for name, found in json.loads(place.read_text(encoding="utf-8")).items():
            exact = [100 * share for _, share in found]
            area = [aurac(ranks, exact, "log2"), aurac(ranks, exact, "linear")]
            nll = aurac(ranks, [value for value, _ in found], "log2")
            rows.append([name, *(f"{value:.3f}" for value, _ in found), f"{nll:.3f}"])
            areas.append([name, *(f"{value:.0f}" for value in exact), *(f"{value:.1f}" for value in area)])
    text = (
        f"A LoRA of rank {RANK} on all 210 linear layers of SmolLM2-135M-Instruct, alpha {RANK}, {steps} steps of "
        f"{BATCH} rows of number words at {RATE:g}, the same rows in the same order and the same first factors for "
        "each objective (`loratools.training.nested`); DyLoRA draws one of the ranks for each step. The first r "
        "components are then cut out (`truncate`), and, of the plain LoRA, also the best rank r (`squeeze`). "
        "MatryoshkaLoRA trains B P A with a diagonal P and leaves P out afterwards; `sqrt` has the scales of the "
        "authors' script; P kept: the same with P multiplied into A, so that the whole rank is what was trained. On "
        f"{n_rows} "
        f"held-out rows; the standard error of exact answers is at most {50 / n_rows**0.5:.1f} points. AURAC is the "
        f"area under "
        "the curve over the rank, on log2 of it, or on the rank itself. One seed.\n\nExact answers, %:\n\n"
    )
    wide = [str(rank) for rank in ranks]
    return (
        text
        + table(["", *wide, "AURAC log2", "AURAC linear"], areas)
        + "\n\nNegative log-likelihood of a token, and its area on log2 (less is better):\n\n"
        + table(["", *wide, "area"], rows)
    )


def _scored(
    real: RealModel, folder: Path, objective: Objective, scaling: Scaling, ranks: list[int], steps: int
) -> dict[str, list[tuple[float, float]]]:
    """Train by an objective; NLL and share of exact answers at each rank, for each way to cut."""
    from loratools import load, squeeze
    from loratools.training.nested import diagonal, nested

    keep = scaling == "keep"
    name = objective if keep else f"{objective}, {scaling}"
    model, place = fresh(real, RANK, RANK) if keep else fresh(real, RANK, 1, "rslora"), folder / name
    with nested(model, objective, ranks, scaling=scaling, seed=0) as begin_step:
        train(real, model, steps=steps, rate=RATE, place=place, forward=lambda _, step: begin_step())
    cuts: list[tuple[str, Path, Cut]] = [(name, place, _prefix if keep else _prefix_sqrt)]
    if objective == "lora":
        cuts.append(("lora, squeezed", place, lambda adapter, rank: squeeze(adapter, rank)[0]))
    if objective == "matryoshka":
        _fold(model, diagonal(RANK, ranks, scaling))
        model.save_pretrained(folder / f"{name}, folded", save_embedding_layers=False)
        cuts.append((f"{name}, P kept", folder / f"{name}, folded", _prefix))
    model.unload()
    found: dict[str, list[tuple[float, float]]] = {}
    for name, place, cut in cuts:
        for rank in ranks:
            adapter = load(place)
            found.setdefault(name, []).append(scores(real, adapter if rank == RANK else cut(adapter, rank)))
            print(name, rank, *found[name][-1], file=sys.stderr, flush=True)
    return found


def _prefix(adapter: Adapter, rank: int) -> Adapter:
    from loratools import truncate

    return truncate(adapter, rank)[0]


def _prefix_sqrt(adapter: Adapter, rank: int) -> Adapter:
    from loratools import truncate

    return truncate(adapter, rank, nested="matryoshka", scaling="sqrt")[0]


def _fold(model: Any, diagonal: list[float]) -> None:
    """B P A for B A, in place."""
    import torch

    from loratools.training.anneal import lora_layers

    with torch.no_grad():
        for _, layer in lora_layers(model, "default"):
            weight = layer.lora_A["default"].weight
            weight.mul_(torch.tensor(diagonal).to(weight).unsqueeze(1))


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
