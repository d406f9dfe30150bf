"""Seeded synthetic adapters in PEFT's format, made once and kept in a temporary folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from contestants import CACHE

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama_like(layers: int, *, width: int = 4096, rank: int = 64, seed: int = 0) -> Path:
    """The weights file of an adapter on q, k, v and o of every layer, bf16, spectra near i ** -p, p in 0.5 to 1.3."""
    folder = CACHE / f"llama-{layers}x{width}-r{rank}-s{seed}"
    weights = folder / "adapter_model.safetensors"
    if weights.is_file():
        return weights
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for projection in PROJECTIONS:
            power = 0.5 + 0.8 * torch.rand((), generator=generator)
            root = torch.arange(1, rank + 1).pow(-power / 2)
            up = torch.randn(width, rank, generator=generator) * root
            down = torch.randn(rank, width, generator=generator) * root.unsqueeze(1)
            mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q  # trained factors are not sorted
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            tensors[f"{prefix}.lora_A.weight"] = (mix.T @ down / width**0.5).bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = (up @ mix / width**0.5).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, rank)
    unfinished = folder / f"{weights.name}.{os.getpid()}"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(weights)
    return weights


def flux_like(*, rank: int = 43, seed: int = 0) -> Path:
    """A kohya LoRA on every linear layer of FLUX's blocks, bf16, about 300 MB: fused projections, alpha beside each."""
    weights = CACHE / f"flux-r{rank}-s{seed}" / "lora.safetensors"
    if weights.is_file():
        return weights
    import torch
    from safetensors.torch import save_file

    width, hidden = 3072, 12288
    double = {"attn_qkv": (3 * width, width), "attn_proj": (width, width), "mlp_0": (hidden, width)}
    double["mlp_2"] = (width, hidden)
    single = {"linear1": (3 * width + hidden, width), "linear2": (width, width + hidden)}
    shapes = {f"double_blocks_{i}_{s}_{n}": d for i in range(19) for s in ("img", "txt") for n, d in double.items()}
    shapes |= {f"single_blocks_{i}_{n}": d for i in range(38) for n, d in single.items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (m, n) in shapes.items():
        name = f"lora_unet_{module}"
        tensors[f"{name}.alpha"] = torch.tensor(16.0)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, n, generator=generator).bfloat16()
        tensors[f"{name}.lora_up.weight"] = torch.randn(m, rank, generator=generator).bfloat16()
    weights.parent.mkdir(parents=True, exist_ok=True)
    unfinished = weights.with_suffix(f".{os.getpid()}")
    save_file(tensors, unfinished, metadata={"ss_network_dim": str(rank), "ss_network_alpha": "16"})
    unfinished.replace(weights)
    return weights


def header_only(nbytes: int, *, width: int = 4096, rank: int = 64) -> Path:
    """The weights file of an adapter of about `nbytes`, all zeros and mostly a hole: for commands that read headers."""
    layers = round(nbytes / (len(PROJECTIONS) * 2 * width * rank * 2))
    folder = CACHE / f"hole-{layers}x{width}-r{rank}"
    weights = folder / "adapter_model.safetensors"
    if weights.is_file():
        return weights
    specs, offset, size = {"__metadata__": {"format": "pt"}}, 0, width * rank * 2
    for layer in range(layers):
        for projection in PROJECTIONS:
            for slot, shape in (("A", [rank, width]), ("B", [width, rank])):
                key = f"base_model.model.model.layers.{layer}.self_attn.{projection}.lora_{slot}.weight"
                specs[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
                offset += size
    header = json.dumps(specs).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, rank)
    unfinished = folder / f"{weights.name}.{os.getpid()}"
    with unfinished.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    unfinished.replace(weights)
    return weights


def write_config(folder: Path, rank: int) -> None:
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
