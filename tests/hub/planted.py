"""Adapters whose deltas are known, and what a hub may make of them; expected values in dense float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # target -> down (r, n), up (m, r)
TARGETS = tuple(f"model.layers.{i}.self_attn.{name}" for i in range(4) for name in ("q_proj", "v_proj"))


def draw(seed: int, *, rank: int = 4, sides: tuple[int, int] = (64, 48)) -> Factors:
    """An adapter like no other."""
    generator = torch.Generator().manual_seed(seed)
    return {
        target: (
            torch.randn(rank, sides[1], generator=generator),
            torch.randn(sides[0], rank, generator=generator),
        )
        for target in TARGETS
    }


def gauged(factors: Factors, seed: int) -> Factors:
    """The same deltas of other factors: (B Q, Q^-1 A) with a random Q for each target."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for target, (down, up) in factors.items():
        q = torch.randn(len(down), len(down), generator=generator, dtype=torch.float64)
        found[target] = ((torch.linalg.inv(q) @ down.double()).float(), (up.double() @ q).float())
    return found


def summed(parts: Mapping[float, Factors]) -> Factors:
    """Weighted sums of deltas, the factors side by side."""
    return {
        t: (torch.cat([f[t][0] for f in parts.values()]), torch.cat([w * f[t][1] for w, f in parts.items()], 1))
        for t in TARGETS
    }


def write(folder: Path, factors: Factors, *, alpha: float = 1.0, magnitude: bool = False) -> Path:
    """A PEFT folder with deltas of `alpha` up down."""
    tensors = {}
    rank = len(next(iter(factors.values()))[0])
    for target, (down, up) in factors.items():
        stem = f"base_model.model.{target}"
        tensors |= {f"{stem}.lora_A.weight": down.contiguous(), f"{stem}.lora_B.weight": up.contiguous()}
        if magnitude:
            tensors[f"{stem}.lora_magnitude_vector"] = torch.ones(len(up))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha * rank, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def dense(factors: Factors, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The deltas, in float64."""
    return {target: scale * up.double() @ down.double() for target, (down, up) in factors.items()}


def product(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """The inner product of whole deltas."""
    return sum(float((a[t] * b[t]).sum()) for t in a if t in b)


def cosine_of(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """The cosine of whole deltas."""
    return product(a, b) / (product(a, a) * product(b, b)) ** 0.5
