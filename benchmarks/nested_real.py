"""One adapter for many ranks on a real task: LoRA, DyLoRA and MatryoshkaLoRA on the same budget, cut to every rank.

What is trained, and what each way to cut it came to, lies in the cache of benchmarks: an interrupted run goes on there.
"""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from contestants import cache_of, device, kept, of_size, table
from number_words import BATCH, fresh, load_real, reason_missing, scores, train

if TYPE_CHECKING:
    from real.smollm2 import RealModel

    from loratools.adapter import Adapter
    from loratools.training.nested import Objective, Scaling

Cut = Callable[["Adapter", int], "Adapter"]
Real = Callable[[], "RealModel"]

RANK, STEPS, RATE, ROWS = 16, 100, 1e-3, 128


@dataclass(frozen=True)
class Trained:
    """An objective, and where what it made lies; of MatryoshkaLoRA also with P."""

    objective: Objective
    scaling: Scaling
    folder: Path

    @property
    def name(self) -> str:
        return self.objective if self.scaling == "keep" else f"{self.objective}, {self.scaling}"

    @property
    def with_p(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}, P kept")

    def cuts(self) -> list[tuple[str, Path, Cut]]:
        """Every way to cut it: a name, the adapter, and what makes one of lower rank of it."""
        found: list[tuple[str, Path, Cut]] = [
            (self.name, self.folder, _prefix if self.scaling == "keep" else _prefix_sqrt)
        ]
        if self.objective == "lora":
            found.append((f"{self.name}, squeezed", self.folder, _squeezed))
        if self.objective == "matryoshka":
            found.append((f"{self.name}, P kept", self.with_p, _prefix))
            found.append((f"{self.name}, P kept, squeezed", self.with_p, _squeezed))
        return found


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    title = "# Nested training\n\n"
    if reason := reason_missing():
        return f"{title}Skipped: {reason}."
    steps, n_rows = of_size((4, 16), (STEPS, ROWS), (700, 256), quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        real = functools.cache(lambda: load_real(Path(folder), n_rows=n_rows))
        return title + _measured(real, steps=steps, n_rows=n_rows)


def _measured(real: Real, *, steps: int, n_rows: int) -> str:
    from loratools import __version__
    from loratools.ops.aurac import aurac

    ranks = [2**i for i in range(RANK.bit_length()) if 2**i <= RANK]
    cache = cache_of("nested_real", __version__, device(), steps, n_rows, RANK, RATE)
    several: tuple[tuple[Objective, Scaling], ...] = (
        ("lora", "keep"),
        ("dylora", "keep"),
        ("matryoshka", "keep"),
        ("matryoshka", "sqrt"),
    )
    rows, areas = [], []
    for objective, scaling in several:
        trained = Trained(objective, scaling, cache / f"{objective}, {scaling}")
        for name, place, cut in trained.cuts():
            score = functools.partial(_scored, name, real, trained, place, cut, ranks, steps)
            found = kept(cache / f"{name}.json", score)
            exact = [100 * share for _, share in found]
            area = [aurac(ranks, exact, "log2"), aurac(ranks, exact, "linear")]
            nll = aurac(ranks, [value for value, _ in found], "log2")
            rows.append([name, *(f"{value:.3f}" for value, _ in found), f"{nll:.3f}"])
            areas.append([name, *(f"{value:.0f}" for value in exact), *(f"{value:.1f}" for value in area)])
    text = (
        f"A LoRA of rank {RANK} on all 210 linear layers of SmolLM2-135M-Instruct, alpha {RANK}, {steps} steps of "
        f"{BATCH} rows of number words at {RATE:g}, the same rows in the same order and the same first factors for "
        "each objective (`loratools.training.nested`); DyLoRA draws one of the ranks for each step. The first r "
        "components are then cut out (`truncate`); squeezed: the best rank r instead (`squeeze`). MatryoshkaLoRA "
        "trains B P A with a diagonal P and leaves P out afterwards; `sqrt` has the scales of the authors' script; P "
        "kept: P is multiplied into A (`keep_diagonal`), so that the whole rank is what was trained. P is up to "
        f"{len(ranks)} times the scale of the others, and components learn as much faster. On {n_rows} held-out rows; "
        f"the standard error of exact answers is at most {50 / n_rows**0.5:.1f} points. AURAC is the area under the "
        "curve over the rank, on log2 of it, or on the rank itself. One seed, one learning rate.\n\nExact answers, "
        "%:\n\n"
    )
    wide = [str(rank) for rank in ranks]
    return (
        text
        + table(["", *wide, "AURAC log2", "AURAC linear"], areas)
        + "\n\nNegative log-likelihood of a token, and its area on log2 (less is better):\n\n"
        + table(["", *wide, "area"], rows)
    )


def _scored(
    name: str, real: Real, trained: Trained, place: Path, cut: Cut, ranks: list[int], steps: int
) -> list[tuple[float, float]]:
    """NLL and share of exact answers at each rank; it is trained first, if that is not in the cache."""
    from loratools import load

    if not trained.folder.is_dir():
        _train(real(), trained, ranks, steps)
    found = []
    for rank in ranks:
        adapter = load(place)
        found.append(scores(real(), adapter if rank == RANK else cut(adapter, rank)))
        print(name, rank, *found[-1], file=sys.stderr, flush=True)
    return found


def _train(real: RealModel, trained: Trained, ranks: list[int], steps: int) -> None:
    """By an objective; the folder without P is there last, and tells that all is."""
    from loratools.training.nested import keep_diagonal, nested
    from loratools.training.peft_model import save_adapter

    model = fresh(real, RANK, RANK) if trained.scaling == "keep" else fresh(real, RANK, 1, "rslora")
    new = trained.folder.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    with nested(model, trained.objective, ranks, scaling=trained.scaling, seed=0) as begin_step:
        train(real, model, steps=steps, rate=RATE, place=new, forward=lambda _, step: begin_step())
    if trained.objective == "matryoshka":
        keep_diagonal(model, ranks, scaling=trained.scaling)
        save_adapter(model, trained.with_p)
    model.unload()
    new.replace(trained.folder)


def _squeezed(adapter: Adapter, rank: int) -> Adapter:
    from loratools import squeeze

    return squeeze(adapter, rank)[0]


def _prefix(adapter: Adapter, rank: int) -> Adapter:
    from loratools import truncate

    return truncate(adapter, rank)[0]


def _prefix_sqrt(adapter: Adapter, rank: int) -> Adapter:
    from loratools import truncate

    return truncate(adapter, rank, nested="matryoshka", scaling="sqrt")[0]


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
