"""Trained deltas in every family at equal bytes: two LoRAs and a full fine-tune of one model, with its weights."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from contestants import ROOT, table

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.reports.bakeoff import BakeoffReport, Entrant

FIGURE = ROOT / "docs" / "images" / "families.png"
TARGETS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.mlp.gate_proj",
    "model.layers.10.self_attn.k_proj",
    "model.layers.20.mlp.down_proj",
    "model.layers.20.self_attn.o_proj",
    "model.layers.29.self_attn.v_proj",
)
RANK = 64
SHARES = (4, 8, 16)  # of the bytes of a LoRA of rank 64 in bf16
FULL = "en_full_ft_delta_layers_0_10_20_29.safetensors"
KINDS = {
    "low rank": ("lora", "ldu", "latent_lora", "blocklora"),
    "low rank with shared numbers": ("unilora", "s2lora"),
    "low rank beside and behind the base": ("hydra",),
    "low rank in wavelet bands": ("wavelet", "wara"),
    "kernel of points": ("snell",),
    "single entries, groups or blocks": ("shira", "sparse", "nm", "blocksparse"),
    "single coefficients": ("wavelet_sparse", "qwha"),
    "rows or columns": ("s2ft", "paca"),
    "bases of the base weight": ("lora-xs", "salt", "loldu"),
    "random bases or places": ("vera", "randlora", "tera", "fourierft", "waveft"),
}
DELTAS = {"en_lora_r8": "LoRA of rank 8", "en_lora_r64": "LoRA of rank 64", FULL: "full fine-tune"}


def main(*, quick: bool = False) -> str:
    """The tables and what they say, as Markdown; a run that is not `quick` draws the figure of the docs."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path.append(str(ROOT / "tests"))
    from real.smollm2 import missing

    title = "# Which parameterisation suits which delta\n\n"
    if reason := missing():
        return f"{title}Skipped: {reason}."
    with tempfile.TemporaryDirectory() as folder:
        reports = measured(Path(folder), quick=quick)
    return written(title, reports, quick=quick)


def written(title: str, reports: dict[str, BakeoffReport], *, quick: bool) -> str:
    """The page; the figure too, unless `quick`."""
    from loratools.reports.plot_bakeoff import plot_bakeoffs
    from loratools.sizes import format_size

    if not quick:
        plot_bakeoffs({f"{name[0].upper()}{name[1:]}": report for name, report in reports.items()}, FIGURE, force=True)
    budgets = sorted({e.budget for report in reports.values() for e in report.entrants}, reverse=True)
    sizes = ", ".join(f"1/{share} ({format_size(b)})" for share, b in zip(SHARES, budgets, strict=True))
    method = (
        f"Trained deltas of {len(next(iter(reports.values())).targets)} matrices of SmolLM2-135M-Instruct (queries, "
        "keys, values, outputs and two of the MLP, from four layers) put through every family by `loratools.bakeoff`, "
        "with the base weights, so that families that are fitted to them take part: a LoRA of rank 8, one of rank 64, "
        "and a full fine-tune, all three on one task. Every family gets the same bytes of a whole file, numbers in "
        f"bf16: {sizes} of what a LoRA of rank {RANK} takes. `error` is ||delta - delta'|| / ||delta|| of all matrices "
        "together, as stored; `rank` the mean rank of what the file holds. A family that is not in a table, or has a "
        "gap, has no file that small.\n\n"
        "Most families were made to be trained in, and may do well there; this page asks another question: how near "
        "they come to a delta that was trained elsewhere."
    )
    parts = [
        f"{title}{method}\n\n![Error against bytes for every family](../images/{FIGURE.name})",
        _kinds(reports, budgets),
        _said(reports, budgets),
        *(f"## {name[0].upper()}{name[1:]}\n\n{_families(report, budgets)}" for name, report in reports.items()),
        (
            "## See also\n\nThe energy that wavelets keep beside the SVD with as many numbers: "
            "[transforms](transform_speed.md). Rank against numbers of TeRA, RandLoRA, VeRA and Uni-LoRA: "
            "[random and shared bases](bases.md). All formulas: [families](../families.md). The same for an adapter of "
            "your own: `loratools bakeoff my_lora base --plot families.png`."
        ),
    ]
    return "\n\n".join(parts)


def _families(report: BakeoffReport, budgets: list[int]) -> str:
    """A row for each family, the nearest in the largest file first."""
    found = {(e.family, e.budget): e for e in report.entrants}
    names = sorted({e.family for e in report.entrants}, key=lambda n: min(_errors(found, n, budgets)))
    rows = []
    for name in names:
        row = [name]
        for budget in budgets:
            entrant = found.get((name, budget))
            row += ["", ""] if entrant is None else [f"{entrant.relative_error:.3f}", f"{entrant.rank or 0:.0f}"]
        rows.append(row)
    header = [cell for share in SHARES for cell in (f"error, 1/{share}", "rank")]
    return table(["family", *header], rows)


def _errors(found: dict[tuple[str, int], Entrant], name: str, budgets: list[int]) -> list[float]:
    return [found[name, budget].relative_error for budget in budgets if (name, budget) in found]


def _kinds(reports: dict[str, BakeoffReport], budgets: list[int]) -> str:
    """The best family of each kind for each delta, in the middle budget, and what these figures say."""
    share, budget = SHARES[1], budgets[1]
    best: dict[tuple[str, str], Entrant | None] = {}
    for delta, report in reports.items():
        for kind, names in KINDS.items():
            entered = [e for e in report.entrants if e.budget == budget and e.family in names]
            best[kind, delta] = min(entered, key=lambda e: e.relative_error, default=None)
    rows = [[kind, *(_cell(best[kind, delta]) for delta in reports)] for kind in KINDS]
    optimum = [f"{min(error for size, error in report.reference if size <= budget):.3f}" for report in reports.values()]
    rows.append(["low-rank optimum, before rounding", *optimum])
    return f"## The best of each kind, at 1/{share}\n\n{table(['kind', *reports], rows)}"


def _said(reports: dict[str, BakeoffReport], budgets: list[int]) -> str:
    """Which suits which, with the figures of this run."""
    small, large, full_tune = reports.values()

    def lost(report: BakeoffReport, names: Iterable[str], budget: int = budgets[1]) -> str:
        found = [e for e in report.entrants if e.budget == budget and e.family in names]
        best = min(found, key=lambda e: e.relative_error, default=None)
        return "nothing that fits" if best is None else f"{best.family} {best.relative_error:.3f}"

    def optimum(report: BakeoffReport, budget: int) -> str:
        return f"{min(error for size, error in report.reference if size <= budget):.3f}"

    sparse = (*KINDS["single entries, groups or blocks"], *KINDS["single coefficients"])
    drawn = KINDS["random bases or places"]
    based = KINDS["bases of the base weight"]
    return (
        "* **A trained LoRA is of low rank, and its relatives are the families for it.** At "
        f"1/{SHARES[1]} the rank-64 LoRA keeps most as {lost(large, ['lora'])}, {lost(large, ['ldu'])}, "
        f"{lost(large, ['s2lora'])} and {lost(large, ['unilora'])} (the low-rank optimum is "
        f"{optimum(large, budgets[1])}); the rank-8 LoRA as {lost(small, ['lora'])}, {lost(small, ['ldu'])}, "
        f"{lost(small, ['s2lora'])} and {lost(small, ['unilora'])}. What is shared pays little here, for targets "
        f"differ; Block-LoRA and Hydra spend numbers on what an SVD has no use for ({lost(large, ['blocklora'])}, "
        f"{lost(large, ['hydra'])}), and so do bands of wavelets ({lost(large, ['wavelet'])}).\n"
        f"* **Nothing else comes near a LoRA.** The best of sparse entries or coefficients is {lost(large, sparse)} "
        f"for rank 64 and {lost(small, sparse)} for rank 8, of bases of the base weight {lost(large, based)} and "
        f"{lost(small, based)}, of random ones {lost(large, drawn)} and {lost(small, drawn)}: subspaces to be trained "
        "in, not to be fitted to.\n"
        f"* **The full fine-tune is less of low rank.** At 1/{SHARES[0]}, 1/{SHARES[1]} and 1/{SHARES[2]} low rank "
        "loses "
        + ", ".join(lost(full_tune, KINDS["low rank"], budget) for budget in budgets)
        + ", sparse entries "
        + ", ".join(lost(full_tune, KINDS["single entries, groups or blocks"], budget) for budget in budgets)
        + ", single coefficients of wavelets or the Walsh-Hadamard transform "
        + ", ".join(lost(full_tune, KINDS["single coefficients"], budget) for budget in budgets)
        + ", bands of wavelets "
        + ", ".join(lost(full_tune, ["wavelet"], budget) for budget in budgets)
        + ", S2-LoRA "
        + ", ".join(lost(full_tune, ["s2lora"], budget) for budget in budgets)
        + f"; random bases lose {lost(full_tune, drawn, budgets[0])} in the largest file."
    )


def _cell(entrant: Entrant | None) -> str:
    return "-" if entrant is None else f"{entrant.relative_error:.3f} ({entrant.family})"


def measured(folder: Path, *, quick: bool) -> dict[str, BakeoffReport]:
    """The bake-off of each delta, by its title."""
    from real.smollm2 import ADAPTERS, load_real_model

    import loratools

    base = load_real_model(folder, n_rows=1).weights
    found = {}
    for name, title in DELTAS.items():
        adapter = full(folder, base) if name == FULL else loratools.load(ADAPTERS / name)
        chosen = TARGETS[1::3] if quick else TARGETS
        part = replace(adapter, entries={target: adapter.entries[target] for target in chosen})
        whole = sum(sum(entry.base_shape or ()) for entry in part.entries.values()) * RANK * 2
        budgets = tuple(whole // share for share in SHARES)
        found[title] = loratools.bakeoff(part, loratools.Bakeoff(budgets=budgets, sample=0, base=base, dtype="bf16"))
    return found


def full(folder: Path, base: BaseWeights) -> Adapter:
    """What tuning all weights changed, as loratools finds it between the base and the tuned weights."""
    from real.smollm2 import ADAPTERS
    from safetensors.torch import load_file, save_file

    import loratools

    changes = load_file(ADAPTERS / FULL)
    tuned = {name: base.find(name, tuple(change.shape)).float() + change.float() for name, change in changes.items()}
    save_file(tuned, folder / "tuned.safetensors")
    return loratools.differences(base, loratools.load_base(folder / "tuned.safetensors")).adapter


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
