"""The same bytes spent in three ways on a real adapter: one rank for all, equal bytes for all, the global budget."""

from __future__ import annotations

import math
import sys

from contestants import ROOT, table

ADAPTER = ROOT.parent / "shared" / "adapters" / "en_lora_r64"
RANKS = (2, 4, 8, 16, 32)


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    title = "### One rank for all, or one budget\n\n"
    if not ADAPTER.is_dir():
        return f"{title}Skipped: the trained adapter is not at {ADAPTER}."
    from loratools import Budget, load
    from loratools.ops.spectra import measure
    from loratools.ranks import Spectrum, allocate

    adapter = load(ADAPTER)
    spectra = {}
    for measured in measure(adapter):
        entry = adapter.entries[measured.target]
        cost = entry.family.bytes_per_rank(entry.specs, entry.layout)
        rows, columns = entry.base_shape[:2]
        spectra[measured.target] = Spectrum(measured.values, cost, rows=rows, cols=columns)
    norm = sum(s.error_at(0) for s in spectra.values())

    def error(ranks: dict[str, int]) -> float:
        return math.sqrt(sum(spectra[target].error_at(rank) for target, rank in ranks.items()) / norm)

    table_rows = []
    for rank in RANKS:
        nbytes = sum(s.bytes_at(rank) for s in spectra.values())
        share = nbytes / len(spectra)
        even = {target: max(1, min(len(s.values), int(share // s.cost_per_rank))) for target, s in spectra.items()}
        bought = allocate(spectra, Budget(nbytes)).ranks
        one, equal, budget = error(dict.fromkeys(spectra, rank)), error(even), error(bought)
        table_rows.append(
            [
                str(rank),
                f"{nbytes / 1e6:.2f}",
                f"{one:.4f}",
                f"{equal:.4f}",
                f"{budget:.4f}",
                f"{100 * (1 - budget / one):.1f} %",
                f"{min(bought.values())} to {max(bought.values())}",
            ]
        )
    header = ["rank", "MB", "one rank", "equal bytes", "budget", "less error than one rank", "ranks the budget chose"]
    method = (
        f"Relative Frobenius error of the delta, from the exact spectra of {len(spectra)} targets of a LoRA of rank 64 "
        "trained on SmolLM2-135M-Instruct (English number words); bytes are those of the tensors. Less error in the "
        "weights need not mean a better score: see squeeze_real.md.\n\n"
    )
    return title + method + table(header, table_rows)


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
