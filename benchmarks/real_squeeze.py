"""What squeezing costs a real adapter in the task that it was trained for."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from contestants import ROOT, table

RANKS = (1, 2, 4, 8, 16, 32)


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path.append(str(ROOT / "tests"))
    from real.smollm2 import missing

    title = "# Squeezing a real adapter: rank against the task\n\n"
    if reason := missing():
        return f"{title}Skipped: {reason}."
    with tempfile.TemporaryDirectory() as folder:
        return title + _measured(Path(folder), n_rows=32 if quick else 64)


def _measured(folder: Path, *, n_rows: int) -> str:
    from real.smollm2 import ADAPTERS, load_real_model

    from loratools import Budget, Squeeze, load, squeeze_file, truncate
    from loratools.adapter import Adapter

    real = load_real_model(folder, n_rows=n_rows)

    def scores(adapter: Adapter) -> list[str]:
        return [f"{real.nll(adapter):.4f}", f"{real.exact_match(adapter):.3f}"]

    full = load(ADAPTERS / "en_lora_r64")
    size = (ADAPTERS / "en_lora_r64" / "adapter_model.safetensors").stat().st_size
    rows = []
    for rank in RANKS:
        saved, report = squeeze_file(full, folder / f"r{rank}", rank)
        budget, bought = squeeze_file(full, folder / f"b{rank}", Budget(saved.nbytes + 512))
        rows.append(
            [
                str(rank),
                f"{saved.nbytes / 1e6:.2f}",
                f"{report.total['relative_error']:.3f}",
                *scores(load(saved.path)),
                f"{bought.total['relative_error']:.3f}",
                *scores(load(budget.path)),
                *scores(truncate(full, rank)[0]),
            ]
        )
    rows.append(["64, as trained", f"{size / 1e6:.2f}", "0", *scores(full), *[""] * 5])
    rows.append(["8, trained at 8", "", "", *scores(load(ADAPTERS / "en_lora_r8")), *[""] * 5])
    header = ["rank", "MB", "squeezed: error", "NLL", "exact"]
    header += ["budget of that size: error", "NLL", "exact", "prefix: NLL", "exact"]
    dora = load(ADAPTERS / "en_dora_r16")
    dora_rows = []
    for rank in (4, 8):
        saved, report = squeeze_file(dora, folder / f"d{rank}", rank, options=Squeeze(base=real.weights))
        dora_rows.append([str(rank), f"{report.total['relative_error']:.3f}", *scores(load(saved.path))])
    dora_rows.append(["16, as trained", "0", *scores(dora)])
    method = (
        "LoRA of rank 64 on all 210 linear layers of SmolLM2-135M-Instruct, trained to write numbers as English words; "
        f"squeezed with loratools, merged into the base with `loratools.delta`, evaluated on {n_rows} numbers that the "
        "training did not see; budgets may take half a kB more than the uniform file. "
        "NLL: mean negative log-likelihood of an answer token (the base alone: "
        f"{real.nll():.2f}). Exact: share of greedy answers that are right word for word, standard error at most "
        f"{0.5 / n_rows**0.5:.3f}. Error: of the delta, Frobenius, relative. Prefix: the first components as trained, "
        "without an SVD. One adapter, one seed, one task: others will differ."
    )
    dora_title = "DoRA of rank 16 on the same task (fewer training steps), squeezed with its base:"
    return "\n\n".join([method, table(header, rows), dora_title, table(["rank", "error", "NLL", "exact"], dora_rows)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    sys.path.insert(0, str(ROOT))
    print(main(quick=parser.parse_args().quick))
