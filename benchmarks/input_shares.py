"""How much of the weight of errors should follow measured inputs, by what a real adapter loses of its task."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

from contestants import ROOT, table

SHARES = (0.0, 0.5, 0.8, 1.0)
RATIOS = (64,)
N_TEXTS = 128


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path.append(str(ROOT / "tests"))
    from real.smollm2 import missing

    title = "# The share of measured inputs"
    if reason := missing():
        return f"{title}\n\nSkipped: {reason}."
    with tempfile.TemporaryDirectory() as folder:
        return f"{title}\n\n{_shares(Path(folder), n_rows=32 if quick else 256)}"


def _shares(folder: Path, *, n_rows: int) -> str:
    from real.smollm2 import ADAPTERS, load_real_model

    from loratools import Calibrate, Quantize, calibrate, load, quantize_file
    from loratools.training.texts import read_texts

    real = load_real_model(folder, n_rows=n_rows)
    adapter = load(ADAPTERS / "en_lora_r64")
    assert adapter.origin is not None
    texts = read_texts(ADAPTERS / "data" / "numwords_en_train.jsonl", N_TEXTS)
    with real.merged(adapter):
        met = calibrate(
            real.model, adapter, texts, tokenizer=real.tokenizer, options=Calibrate(max_texts=N_TEXTS, batch=16)
        )
    rows = []
    for share in SHARES:
        cells = []
        for ratio in RATIOS:
            with mock.patch("loratools.ops.gridding.MEASURED", share):
                options = Quantize(budget=adapter.origin.nbytes // ratio, weights=met)
                saved, report = quantize_file(adapter, folder / "out", options, force=True)
            cells += [f"{report.total['relative_error']:.3f}", f"{real.nll(load(saved.path)):.4f}"]
        rows.append([f"{share:g}", *cells])
    text = (
        "The grid with `--weights`, en_lora_r64: how much of what an error counts is by the inputs as they were met, "
        f"the rest the same in every direction. NLL of an answer token, {n_rows} rows, {N_TEXTS} texts; "
        f"{real.nll(adapter):.4f} as trained. 0 is the grid without weights."
    )
    header = ["share", *(cell for ratio in RATIOS for cell in (f"1/{ratio}: error", "NLL"))]
    return f"{text}\n\n" + table(header, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    sys.path.insert(0, str(ROOT))
    print(main(quick=parser.parse_args().quick))
