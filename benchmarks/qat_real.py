"""A real adapter at 1/64 of its bytes and less: what training through the rounding makes of it, by quantiser."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contestants import ROOT, device, of_size, table
from number_words import load_real, reason_missing, scores

if TYPE_CHECKING:
    from real.smollm2 import RealModel

    from loratools import Adapter
    from loratools.ops.quantize import Quantize

STEPS, BATCH = 140, 8
RATE = 1e-3  # of the optimizer, for numbers that a scale multiplies
OWN_RATE = 3e-4  # with which the adapter was trained
UNITS = 0.05  # likewise on a grid, in units of it
GROWTH = 0.82  # share of the goal at which a grid starts: training makes more of its numbers differ from zero


@dataclass(frozen=True)
class Contestant:
    """A way to `1 / ratio` of the bytes: a squeeze to a rank and the rounding of `pack`, or the grid."""

    ratio: int
    name: str
    rank: int | None = None  # None: ranks are those of the grid
    pack: tuple[str, int] = ("exact", 4)  # method, bits


CONTESTANTS = (
    Contestant(64, "signs", 15, ("sign", 1)),
    Contestant(64, "grid"),
)


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    title = "# Trained at few bits\n\n"
    if reason := reason_missing():
        return f"{title}Skipped: {reason}."
    with tempfile.TemporaryDirectory() as folder:
        steps, n_rows = of_size((8, 32), (STEPS, 256), (700, 256), quick=quick)
        return title + _measured(Path(folder), steps=steps, n_rows=n_rows)


def _measured(folder: Path, *, steps: int, n_rows: int) -> str:
    from real.smollm2 import ADAPTERS

    from loratools import load

    real = load_real(folder, n_rows=n_rows)
    adapter = load(ADAPTERS / "en_lora_r64")
    assert adapter.origin is not None
    nbytes = adapter.origin.nbytes
    nll, exact = scores(real, adapter)
    rows = [["as trained", "64", _mb(nbytes), f"{nll:.4f}", f"{exact:.3f}", "", "", "100 %", ""]]
    print(f"as trained: {nll:.4f}, {exact:.3f}", file=sys.stderr, flush=True)
    for one in CONTESTANTS:
        start, pack = _start(adapter, one, nbytes // one.ratio, folder)
        rank = max(entry.rank for entry in start.entries.values())
        rounded, _ = _packed(start, pack, folder)
        rounded_nll, rounded_exact = scores(real, rounded)
        before = f"{rounded_nll:.4f}", f"{rounded_exact:.3f}"
        seconds = _trained(real, start, one, folder / "trained", steps)
        made, size = _packed(load(folder / "trained"), pack, folder)
        found_nll, found = scores(real, made)
        after = f"{found_nll:.4f}", f"{found:.3f}", f"{100 * found / exact:.0f} %"
        name = f"1/{one.ratio}, {one.name}" + ("" if size * one.ratio <= nbytes else " (grown too large)")
        rows.append([name, str(rank), _mb(size), *before, *after, f"{seconds:.0f}"])
        print(*rows[-1], file=sys.stderr, flush=True)
    seconds = _trained(real, adapter, None, folder / "trained", steps)
    longer = load(folder / "trained")
    found_nll, found = scores(real, longer)
    after = f"{found_nll:.4f}", f"{found:.3f}", f"{100 * found / exact:.0f} %"
    rows.append(["not rounded, trained on", "64", _mb(nbytes), f"{nll:.4f}", f"{exact:.3f}", *after, f"{seconds:.0f}"])
    text = (
        "en_lora_r64: LoRA of rank 64 on all 210 linear layers of SmolLM2-135M-Instruct, bf16, trained for 140 steps "
        f"of 8 rows. Each contestant goes on for {steps} steps of {BATCH} rows of the same training data, its factors "
        "rounded in every pass and gradients passed straight through (`loratools.training.qat`), and is then packed by "
        "`quantize` and read again, for all numbers; MB count every byte of the file. Signs: the best "
        f"squeeze to that rank, a scale for each component, AdamW at {RATE:g}. Grid: what `quantize --budget` makes, "
        f"its largest rank shown, AdamW at {UNITS:g} of a unit. Before: rounded, not trained. Exact: share of {n_rows} "
        f"held-out greedy answers that are right word for word (standard error at most {0.5 / n_rows**0.5:.3f}); of as "
        "trained: relative to the adapter as it was. NLL: of an answer token. Going on also teaches the task, of which "
        "the adapter had seen little: the last row is as many steps without rounding, at the adapter's own learning "
        f"rate, {OWN_RATE:g}. One adapter, one task, one seed."
    )
    heads = ["", "rank", "MB", "NLL before", "exact before", "NLL", "exact", "of as trained", "seconds"]
    return f"{text}\n\n" + table(heads, rows)


def _start(adapter: Adapter, one: Contestant, goal: int, folder: Path) -> tuple[Adapter, Quantize]:
    """What is trained, and how it is packed."""
    from loratools import Quantize, load, quantize_file, squeeze

    method, bits = one.pack
    pack = Quantize(method, bits, scales="component")
    if one.rank is not None:
        return squeeze(adapter, one.rank)[0], pack
    saved, _ = quantize_file(adapter, folder / "start.safetensors", Quantize(budget=int(GROWTH * goal)), force=True)
    return load(saved.path), pack


def _packed(adapter: Adapter, pack: Quantize, folder: Path) -> tuple[Adapter, int]:
    """The adapter as it is read from its file, and the bytes of that."""
    from loratools import load, quantize_file

    saved, _ = quantize_file(adapter, folder / "packed.safetensors", pack, force=True)
    return load(saved.path), saved.nbytes


def _trained(real: RealModel, start: Adapter, one: Contestant | None, place: Path, steps: int) -> float:
    """Train `start` and save it in PEFT's layout; the seconds that the steps took."""
    from loratools.peft import load_adapter
    from loratools.training.qat import Grid, quantization_aware_steps, rounding

    model = load_adapter(real.model, start, is_trainable=True)
    try:
        began = time.perf_counter()
        if one is None:
            quantise, rate = (lambda rows: rows), OWN_RATE
        elif one.rank is None:
            quantise, rate = Grid(), UNITS
        else:
            quantise, rate = rounding(*one.pack), RATE
        batches = _batches(real.tokenizer, steps)
        quantization_aware_steps(model, batches, quantise, steps=steps, learning_rate=rate, loss=_answer_loss)
        seconds = time.perf_counter() - began
        model.save_pretrained(place)
    finally:
        model.unload()
    return seconds


def _batches(tokenizer: Any, steps: int) -> list[Any]:
    import evaluate
    from real.smollm2 import ADAPTERS

    rows = evaluate.read_rows(ADAPTERS / "data" / "numwords_en_train.jsonl")
    random.Random(1).shuffle(rows)
    encoded = [evaluate.encode(tokenizer, row) for row in rows[: steps * BATCH]]
    batches = [evaluate.collate(tokenizer, encoded[i : i + BATCH]) for i in range(0, len(encoded), BATCH)]
    return [tuple(tensor.to(device()) for tensor in batch) for batch in batches]


def _answer_loss(model: Any, batch: Any) -> Any:
    import evaluate

    return evaluate.answer_loss(model, *batch)[0]


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    sys.path.insert(0, str(ROOT))
    print(main(quick=parser.parse_args().quick))
