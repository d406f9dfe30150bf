"""Hand-made adapter files, and their deltas by the formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

F64 = np.ndarray


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def f64(x: Tensor) -> F64:
    return x.double().numpy()


def write(folder: Path, name: str, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """A weights file in `folder`, a pickle unless its name says safetensors, with an adapter_config.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({key: t.contiguous() for key, t in tensors.items()}, folder / name)
    else:
        torch.save(tensors, folder / name)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / name


def assert_close(found: Tensor, truth: F64) -> None:
    assert tuple(found.shape) == truth.shape
    assert np.linalg.norm(f64(found) - truth) < 3e-7 * np.linalg.norm(truth)
