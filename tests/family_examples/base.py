"""An update whose delta a naive float64 formula gives, written apart from the code under test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loratools.families import Update
from loratools.families.base import Layout

F64 = np.ndarray


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def f64(x: Tensor) -> F64:
    return x.double().numpy()


@dataclass(frozen=True)
class Example:
    """Stored tensors by slot, shared ones included, and the delta in the base's layout that they stand for."""

    family: type[Update]
    tensors: Mapping[str, Tensor]
    delta: F64
    scale: float = 1.0
    layout: Layout = Layout()
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: Tensor | None = None
    bias: Tensor | None = None  # the base's own
    bias_delta: F64 | None = None

    def update(self) -> Update:
        return self.family.from_parameters(
            dict(self.tensors), scale=self.scale, layout=self.layout, settings=self.settings
        )
