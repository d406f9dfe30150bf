"""Files of nonlinear bottlenecks in every layout, and what they add, in float64 apart from the code under test."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

F64 = np.ndarray
SIZE, WIDTH, LAYERS = 12, 6, 2

_erf = np.vectorize(math.erf)
ACTS: Mapping[str, Callable[[F64], F64]] = {
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: z * (1 + _erf(z / math.sqrt(2))) / 2,
    "silu": lambda z: z / (1 + np.exp(-z)),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "leakyrelu": lambda z: np.where(z > 0, z, 0.01 * z),
    "relu6": lambda z: np.clip(z, 0, 6),
    "gelu_new": lambda z: z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "quick_gelu": lambda z: z / (1 + np.exp(-1.702 * z)),
    "mish": lambda z: z * np.tanh(np.log1p(np.exp(z))),
    "linear": lambda z: z,
}


@dataclass(frozen=True)
class Layout:
    """How one library names the parts of the bottleneck at `name`, and what it does not store."""

    names: tuple[str, ...]
    keys: Callable[[str], dict[str, str]]  # name -> part -> key
    activation: str
    eps: float = 1e-5
    scale: float = 1.0
    file: str = "model.safetensors"
    config: Mapping[str, Any] | None = None


def _adaptertune(name: str) -> dict[str, str]:
    return {f"{role}.{part}": f"{name}.{role}.{part}" for role in ("down", "up") for part in ("weight", "bias")}


def _adaptformer(name: str) -> dict[str, str]:
    parts = {f"{role}.{part}": f"{name}.{role}_proj.{part}" for role in ("down", "up") for part in ("weight", "bias")}
    norm = {f"norm.{part}": f"{name}.adapter_layer_norm_before.{part}" for part in ("weight", "bias")}
    return parts | norm | {"scale": f"{name}.scale"}


def _mosa(name: str) -> dict[str, str]:
    stem, _, side = name.rpartition(".")
    side = side.removeprefix("adapter")
    roles = {"down": f"adapter_down{side}_merge", "up": f"adapter_up{side}_merge"}
    parts = {f"{r}.{p}": f"{stem}.{role}.{p}" for r, role in roles.items() for p in ("weight", "bias")}
    return parts if side else parts | {f"norm.{p}": f"{stem}.adapter_norm.{p}" for p in ("weight", "bias")}


def _hub(name: str, place: int = 0) -> dict[str, str]:
    parts = {f"down.{p}": f"{name}.adapter_down.{place}.{p}" for p in ("weight", "bias")}
    return parts | {f"up.{p}": f"{name}.adapter_up.{p}" for p in ("weight", "bias")}


def _hub_normed(name: str) -> dict[str, str]:
    return _hub(name, 1) | {f"norm.{p}": f"{name}.adapter_norm_before.{p}" for p in ("weight", "bias")}


def _hub_sequence(name: str) -> dict[str, str]:
    return _hub(name, 1) | {f"norm.{p}": f"{name}.adapter_down.0.{p}" for p in ("weight", "bias")}


def _petl(name: str) -> dict[str, str]:
    return {f"{role}.weight": f"{name}.adapter_{role}.weight" for role in ("down", "up")}


def hub_config(activation: str, **fields: Any) -> dict[str, Any]:
    inner = {"mh_adapter": False, "output_adapter": True, "non_linearity": activation, "scaling": 1.0}
    inner |= {"reduction_factor": SIZE / WIDTH, "is_parallel": False}
    return {
        "config": inner | fields,
        "model_type": "bert",
        "model_class": "BertModel",
        "hidden_size": SIZE,
        "name": "t",
    }


_OUT = tuple(f"encoder.layer.{i}.output.adapters.t" for i in range(LAYERS))
_HOULSBY = (*_OUT, *(f"encoder.layer.{i}.attention.output.adapters.t" for i in range(LAYERS)))
LAYOUTS: Mapping[str, Layout] = {
    "adaptertune": Layout(tuple(f"blocks.{i}.adapter" for i in range(LAYERS)), _adaptertune, "gelu"),
    "adaptformer": Layout(tuple(f"blocks.{i}.adaptmlp" for i in range(LAYERS)), _adaptformer, "relu", scale=0.1),
    "mosa": Layout(tuple(f"encoder.layer.{i}.adapter" for i in range(LAYERS)), _mosa, "gelu", eps=1e-6),
    "mosa houlsby": Layout(
        tuple(f"encoder.layer.0.adapter_{side}" for side in ("attn", "ffn")), _mosa, "silu", file="model.pt"
    ),
    "pfeiffer": Layout(_OUT, _hub, "relu", file="pytorch_adapter.bin", config=hub_config("relu")),
    "houlsby": Layout(_HOULSBY, _hub, "silu", file="adapter.safetensors", config=hub_config("swish", mh_adapter=True)),
    "parallel": Layout(
        _OUT, _hub_normed, "tanh", scale=4.0, file="adapter.safetensors",
        config=hub_config("tanh", is_parallel=True, scaling=4.0, ln_before=True),
    ),
    "norm in sequence": Layout(
        _OUT, _hub_sequence, "relu", file="pytorch_adapter.bin", config=hub_config("relu", ln_before=True)
    ),
    "petl": Layout(tuple(f"blocks.{i}.adapter_mlp" for i in range(LAYERS)), _petl, "relu"),
}  # fmt: skip


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of a file, with one that belongs to no bottleneck."""
    shapes = {
        "down.weight": (WIDTH, SIZE), "down.bias": (WIDTH,), "up.weight": (SIZE, WIDTH), "up.bias": (SIZE,),
        "norm.weight": (SIZE,), "norm.bias": (SIZE,),
    }  # fmt: skip
    found = {"head.weight": rand(seed, 3, 4)}
    for name in layout.names:
        for part, key in layout.keys(name).items():
            seed += 1
            found[key] = torch.tensor([layout.scale]) if part == "scale" else rand(seed, *shapes[part]) / 2
    return found


def write(folder: Path, layout: Layout, tensors: Mapping[str, Tensor]) -> Path:
    """The path to give to a command: a folder where a config goes with the file."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout.file.endswith(".safetensors"):
        save_file({key: t.contiguous() for key, t in tensors.items()}, folder / layout.file)
    else:
        torch.save(dict(tensors), folder / layout.file)
    if layout.config is None:
        return folder / layout.file
    (folder / "adapter_config.json").write_text(json.dumps(layout.config))
    return folder


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that was written, or of the one in a folder."""
    return load_file(path / "adapter.safetensors" if path.is_dir() else path)


def added(layout: Layout, name: str, tensors: Mapping[str, Tensor], inputs: Tensor) -> F64:
    """What the bottleneck adds to the residual stream, by the formula."""
    part = {p: tensors[key].double().numpy() for p, key in layout.keys(name).items() if key in tensors}
    h = inputs.double().numpy()
    if "norm.weight" in part:
        centred = h - h.mean(1, keepdims=True)
        h = (
            centred / np.sqrt((centred**2).mean(1, keepdims=True) + layout.eps) * part["norm.weight"]
            + part["norm.bias"]
        )
    z = h @ part["down.weight"].T + part.get("down.bias", 0.0)
    scale = part.get("scale", layout.scale)
    return np.asarray(scale * (ACTS[layout.activation](z) @ part["up.weight"].T + part.get("up.bias", 0.0)))


def distance(found: F64, truth: F64) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
