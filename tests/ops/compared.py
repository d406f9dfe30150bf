"""Small models and fine-tunes of them, their dense deltas in numpy, and the naive formulas of a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import loratools
from loratools.base_weights import BaseWeights, load_base

Array = np.ndarray
Factors = Mapping[str, tuple[Tensor, Tensor]]  # target -> (up, down)

MODULES = {"self_attn.q_proj": (16, 12), "self_attn.k_proj": (8, 12), "mlp.up_proj": (20, 12)}
SHAPES = {f"model.layers.{i}.{module}": shape for i in range(2) for module, shape in MODULES.items()}


def normal(*shape: int, seed: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base_tensors() -> dict[str, Tensor]:
    """Two layers with falling spectra, an embedding table and norms whose gains are not 1."""
    tensors = {}
    for i, (target, (m, n)) in enumerate(SHAPES.items()):
        u, _, vt = torch.linalg.svd(normal(m, n, seed=i), full_matrices=False)
        tensors[f"{target}.weight"] = (u * torch.logspace(0.5, -1, vt.shape[0])) @ vt
    tensors["model.embed_tokens.weight"] = normal(30, 12, seed=50)
    for i in range(2):
        tensors[f"model.layers.{i}.input_layernorm.weight"] = 1 + normal(12, seed=60 + i, spread=0.3)
    return tensors


def write_model(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    if shards == 1:
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
        return folder
    home = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(home.values()):
        save_file({n: tensors[n].contiguous() for n in home if home[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    return folder


def factors(rank: int, seed: int, spread: float = 0.1, targets: Mapping[str, tuple[int, int]] = SHAPES) -> Factors:
    made = {}
    for i, (target, (m, n)) in enumerate(targets.items()):
        up = normal(m, rank, seed=1000 * seed + 2 * i, spread=spread)
        made[target] = (up, normal(rank, n, seed=1000 * seed + 2 * i + 1))
    return made


def write_peft(
    folder: Path, of: Factors, *, magnitudes: Mapping[str, Tensor] | None = None, scale: float = 2.0, **config: Any
) -> Path:
    folder.mkdir(parents=True)
    tensors = {}
    for target, (up, down) in of.items():
        prefix = f"base_model.model.{target}"
        tensors |= {f"{prefix}.lora_A.weight": down.clone(), f"{prefix}.lora_B.weight": up.clone()}
        if magnitudes is not None:
            tensors[f"{prefix}.lora_magnitude_vector.weight"] = magnitudes[target]
    rank = next(iter(of.values()))[1].shape[0]
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "use_dora": magnitudes is not None}
    fields |= {"target_modules": sorted({t.rpartition(".")[2] for t in of})} | config
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def write_kohya(file: Path, of: Factors, *, scale: float = 2.0) -> Path:
    tensors = {}
    for target, (up, down) in of.items():
        stem = f"lora_unet_{target.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down.clone(), f"{stem}.lora_up.weight": up.clone()}
        tensors[f"{stem}.alpha"] = torch.tensor(scale * down.shape[0])
    save_file(tensors, file, {"ss_network_dim": "3"})
    return file


def numpy_of(tensor: Tensor) -> Array:
    return tensor.double().numpy()


def lora_deltas(of: Factors, scale: float = 2.0) -> dict[str, Array]:
    return {f"{t}.weight": scale * numpy_of(up) @ numpy_of(down) for t, (up, down) in of.items()}


def dora_deltas(
    base: Mapping[str, Tensor], of: Factors, magnitudes: Mapping[str, Tensor]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Deltas and gains: m (W + delta) / ||W + delta|| - W, row by row."""
    deltas, gains = {}, {}
    for name, change in lora_deltas(of).items():
        tuned = numpy_of(base[name]) + change
        gain = numpy_of(magnitudes[name.removesuffix(".weight")]) / np.linalg.norm(tuned, axis=1)
        deltas[name], gains[name] = gain[:, None] * tuned - numpy_of(base[name]), gain
    return deltas, gains


def thin(matrix: Array) -> tuple[Array, Array, Array]:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def share_in(space: Array, matrix: Array) -> float:
    """Of ||matrix||^2 in the span of orthonormal columns."""
    return float(np.linalg.norm(space @ (space.T @ matrix)) ** 2 / np.linalg.norm(matrix) ** 2)


def intruders(base: tuple[Array, Array, Array], tuned: Array, top_k: int, epsilon: float) -> tuple[int, int]:
    """Left and right ones, by the thin SVD of the base."""
    (u0, _, v0), (u, _, v) = base, thin(tuned)
    sides = np.abs(u[:, :top_k].T @ u0), np.abs(v[:top_k] @ v0.T)
    left, right = (int((side.max(axis=1) < epsilon).sum()) for side in sides)
    return left, right


def overlap(a: Array, b: Array) -> float:
    """Mean squared cosine of the principal angles, from the norm of one projector in the other's space."""
    return float(np.trace((a @ a.T) @ (b @ b.T))) / a.shape[1]


def effective_rank(s: Array) -> float:
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def bound(weight: Array, gain: Array) -> float:
    """The greatest ||W_j * g|| of all rows j."""
    return max(float(np.linalg.norm(row * gain)) for row in weight)


def two(tmp_path: Path, make: Callable[[], Any], **config: Any) -> tuple[BaseWeights, dict[str, Any]]:
    """A plain adapter on a base, and what `make` writes, both opened."""
    base = load_base(write_model(tmp_path / "base", base_tensors(), **config))
    plain = loratools.load(write_peft(tmp_path / "plain", factors(3, 1)), base=base)
    return base, {"plain": plain, "other": loratools.load(make(), base=base)}
