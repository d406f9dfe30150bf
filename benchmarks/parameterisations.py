"""Trained deltas in every family at equal bytes: two LoRAs and a full fine-tune of one model, with its weights."""

from __future__ import annotations

import os
import sys
import tempfile
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
    return title


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
