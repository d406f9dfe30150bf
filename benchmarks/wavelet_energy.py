"""What wavelets keep of a real adapter, beside the SVD with as many numbers."""

from __future__ import annotations

import sys

from contestants import ROOT, table

ADAPTER = ROOT.parent / "shared" / "adapters" / "en_lora_r8"
RANKS = (1, 2, 4)
# Family, the option that says how much of it, how much of that a rank of LoRA costs, and other options.
FAMILIES = {
    "lora": ("lora", "rank", 1, {}),
    **{f"wavelet, {w}": ("wavelet", "rank", 2, {"wavelet": w}) for w in ("db1", "db2", "sym8")},
    "wara": ("wara", "rank", 2, {}),
    "wavelet_sparse, db1": ("wavelet_sparse", "count", 0, {}),
    "qwha": ("qwha", "rank", 1, {"allocation": "energy"}),
}


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    title = "### Wavelets of a trained LoRA\n\n"
    if not ADAPTER.is_dir():
        return f"{title}Skipped: the trained adapter is not at {ADAPTER}."
    from loratools import load

    adapter = load(ADAPTER)
    rows = [[name, *(f"{100 * kept(adapter, name, rank, quick=quick):.1f} %" for rank in RANKS)] for name in FAMILIES]
    method = (
        f"The share of squared norm kept of the deltas of a LoRA of rank 8 ({len(adapter)} targets), with as many real "
        "numbers to each target as a LoRA of rank r has; places are not counted. Rows and columns of a weight are in "
        "no order in which neighbours are alike, and so there is nothing smooth for wavelets to find.\n\n"
    )
    return title + method + table(["", *(f"as many as at r = {rank}" for rank in RANKS)], rows)


def kept(adapter: object, name: str, rank: int, *, quick: bool) -> float:
    """The share of energy of all targets together."""
    import torch

    from loratools.adapter import Adapter
    from loratools.families import fittable
    from loratools.families.base import Layout
    from loratools.families.fitting import Source, options_of
    from loratools.linalg.inner import frobenius
    from loratools.ops.reparameterize import distance

    assert isinstance(adapter, Adapter)
    family, unit, factor, more = FAMILIES[name]
    kind = fittable(family)
    lost = whole = 0.0
    for target in list(adapter)[:: 20 if quick else 1]:
        delta = adapter[target].operator().to(torch.float64)
        source = Source(delta, Layout(shape=delta.shape), dtype=torch.float32)
        numbers = rank * sum(delta.shape)
        amount = factor * rank if factor else numbers
        options = options_of(kind, {unit: str(amount), **more})
        lost += distance(delta, kind.encode(source, options).operator().to(torch.float64)) ** 2
        whole += frobenius(delta) ** 2
    return 1 - lost / whole


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(main(quick="--quick" in sys.argv))
