"""How small a real adapter can be made: error at equal bytes for every method, and what that costs in its task."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from contestants import ROOT, table

RATIOS = (4, 8, 16, 32, 64)
TASK_RATIOS = (8, 10, 16, 20, 32, 40, 64)
KEPT = (0.99, 0.95)  # shares of the exact match, of which the smallest files are sought
METHODS = {
    "grid": "loratools, grid",
    "svd": "SVD in bf16",
    "rtn": "round to nearest",
    "petl": "PETL-ViT",
    "loraquant": "LoRAQuant",
}
N_TEXTS = 128


def main(*, quick: bool = False) -> str:
    """The tables, as Markdown."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path.append(str(ROOT / "tests"))
    from real.smollm2 import missing

    title = "# A real adapter in few bits\n\n"
    if reason := missing():
        return f"{title}Skipped: {reason}."
    with tempfile.TemporaryDirectory() as folder:
        return "\n\n".join([title.strip(), _errors(), _task(Path(folder), n_rows=32 if quick else 256)])


def _errors() -> str:
    """The least error of each method within each size."""
    from real.smollm2 import ADAPTERS

    import loratools

    adapter = loratools.load(ADAPTERS / "en_lora_r64")
    found = loratools.pareto(adapter, tuple(METHODS), ratios=RATIOS)
    rows = []
    for ratio in RATIOS:
        best = {
            method: min(
                (p.relative_error for p in found.points if p.method == method and p.bytes * ratio <= found.bytes),
                default=None,
            )
            for method in METHODS
        }
        ours = best["grid"]
        assert ours is not None
        rivals = [error for method, error in best.items() if method != "grid" and error is not None]
        cells = ["-" if error is None else f"{error:.3f}" for error in best.values()]
        rows.append(
            [f"1/{ratio}", f"{found.bytes / ratio / 1e6:.2f}", *cells, f"{100 * (1 - ours / min(rivals)):.0f} %"]
        )
    text = (
        "en_lora_r64: LoRA of rank 64 on all 210 linear layers of SmolLM2-135M-Instruct, bf16, "
        f"{found.bytes / 1e6:.1f} MB. Relative Frobenius error of the whole delta as it is read again, the least that "
        "a method reaches in a file of at most that size, header, scales and index included. The others but the SVD "
        "round factors of rank 64, 32, 16 or 8 (the best squeeze to that rank) at each width that they have; LoRAQuant "
        "with the fault mended that keeps too little energy. Last: how much lower the first column is than the best of "
        "the others."
    )
    return f"## Error at equal bytes\n\n{text}\n\n" + table(["size", "MB", *METHODS.values(), "lower by"], rows)


def _task(folder: Path, *, n_rows: int) -> str:
    from real.smollm2 import ADAPTERS, load_real_model

    from loratools import Calibrate, Quantize, calibrate, load, quantize_file
    from loratools.training.texts import read_texts

    real = load_real_model(folder, n_rows=n_rows)
    adapter = load(ADAPTERS / "en_lora_r64")
    assert adapter.origin is not None
    texts = read_texts(ADAPTERS / "data" / "numwords_en_train.jsonl", N_TEXTS)
    how = Calibrate(max_texts=N_TEXTS, batch=16)
    met = calibrate(real.model, adapter, texts, tokenizer=real.tokenizer, options=how)
    whole_nll, whole = real.nll(adapter), real.exact_match(adapter)
    rows = [["as trained", f"{adapter.origin.nbytes / 1e6:.2f}", "0", f"{whole_nll:.4f}", f"{whole:.3f}", "100 %"]]
    sizes: dict[bool, list[tuple[int, float]]] = {False: [], True: []}  # by inputs: bytes, share of the exact match
    for ratio in TASK_RATIOS:
        for weights in (None, met):
            options = Quantize(budget=adapter.origin.nbytes // ratio, weights=weights)
            saved, report = quantize_file(adapter, folder / f"{ratio}", options, force=True)
            packed = load(saved.path)
            exact = real.exact_match(packed)
            sizes[weights is not None].append((saved.nbytes, exact / whole))
            name = f"1/{ratio}" + ("" if weights is None else ", by inputs")
            error = f"{report.total['relative_error']:.3f}"
            rows.append(
                [
                    name,
                    f"{saved.nbytes / 1e6:.2f}",
                    error,
                    f"{real.nll(packed):.4f}",
                    f"{exact:.3f}",
                    f"{100 * exact / whole:.0f} %",
                ]
            )
    text = (
        f"Exact: share of {n_rows} greedy answers that are right word for word (standard error at most "
        f"{0.5 / n_rows**0.5:.3f}); last, relative to the adapter as trained. NLL: of an answer token. By inputs: "
        f"errors are weighed by what {N_TEXTS} training texts put into each target of the tuned model (`--weights`). "
        "Nothing was trained after rounding. One adapter, one task."
    )
    found = table(
        ["kept", "grid", "grid, by inputs"],
        [[f"{share:.0%} of the exact match", *(_smallest(each, share) for each in sizes.values())] for share in KEPT],
    )
    sought = (
        f"The smallest file, of 1/{', 1/'.join(map(str, TASK_RATIOS))} of the bytes, that keeps so much of it, as does "
        "every larger one; one row more or less of the answers can move it by a size:"
    )
    shown = table(["size", "MB", "error", "NLL", "exact", "of as trained"], rows)
    return f"## The task\n\n{text}\n\n{shown}\n\n{sought}\n\n{found}"


def _smallest(sizes: list[tuple[int, float]], share: float) -> str:
    """The last of the files, largest first, before one keeps less than `share`."""
    best = "none"
    for nbytes, kept in sorted(sizes, reverse=True):
        if kept < share:
            break
        best = f"{nbytes / 1e6:.2f} MB"
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    sys.path.insert(0, str(ROOT))
    print(main(quick=parser.parse_args().quick))
