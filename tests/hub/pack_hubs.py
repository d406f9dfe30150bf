"""Hubs to pack: adapters that share a structure, that share none, and both, in several dialects and ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.files import load

Kind = Literal["shared", "unrelated", "mixed", "clusters"]
LAYERS = 2
INNER = 6


def subspaces(count: int, m: int, n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Orthonormal pairs (m, INNER) and (n, INNER)."""
    generator = torch.Generator().manual_seed(seed)
    sides = [
        [torch.linalg.qr(torch.randn(size, INNER, generator=generator))[0] for size in (m, n)] for _ in range(count)
    ]
    return [(left, right) for left, right in sides]


def factors(kind: Kind, index: int, layer: int, rank: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """up (m, r) and down (r, n) of one adapter."""
    generator = torch.Generator().manual_seed(1000 * layer + index)
    pairs = subspaces(2, m, n, 77 + layer)
    if kind == "unrelated" or (kind == "mixed" and index % 3 == 0):
        return torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    left, right = pairs[index % 2 if kind == "clusters" else 0]
    up = left @ torch.randn(INNER, rank, generator=generator)
    return up, torch.randn(rank, INNER, generator=generator) @ right.T


def write_hub(
    hub: Path,
    kind: Kind,
    count: int = 9,
    *,
    m: int = 48,
    n: int = 40,
    dtype: torch.dtype = torch.float32,
    gauge: bool = False,
    layers: int = LAYERS,
) -> Path:
    """PEFT folders with ranks 4 and 8, every fifth adapter a file of MLX; `gauge`: the same deltas by other factors."""
    for i in range(count):
        rank = 8 if i % 2 else 4
        tensors: dict[str, Tensor] = {}
        for layer in range(layers):
            up, down = factors(kind, i, layer, rank, m, n)
            if gauge:
                generator = torch.Generator().manual_seed(i)
                turn = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
                up, down = (up.double() @ turn).float(), torch.linalg.solve(turn, down.double()).float()
            name = f"model.layers.{layer}.self_attn.q_proj"
            if i % 5 == 4:
                tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = down.T, up.T
            else:
                tensors[f"base_model.model.{name}.lora_A.weight"] = down
                tensors[f"base_model.model.{name}.lora_B.weight"] = up
        folder = hub / f"a{i:02}"
        folder.mkdir(parents=True)
        stored = {key: t.to(dtype).contiguous() for key, t in tensors.items()}
        if i % 5 == 4:
            config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": {"rank": rank, "scale": 2.0}}
            save_file(stored, folder / "adapters.safetensors")
        else:
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"], "note": i}
            save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return hub


def dense(path: Path) -> dict[str, Tensor]:
    """The deltas of an adapter in float64, by the module."""
    with load(path) as adapter:
        return {t: adapter[t].operator().to(torch.float64).dense() for t in adapter}


def squared_error(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Of all deltas together, relative."""
    assert list(before) == list(after)
    lost = sum(float((before[t] - after[t]).square().sum()) for t in before)
    return lost / sum(float(d.square().sum()) for d in before.values())


def folder_size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
