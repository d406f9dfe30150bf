"""Activations of a model: what enters each bottleneck, from a safetensors file or from memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.storage import open_source
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Activations:
    """What enters each bottleneck, by its name: (tokens, d), or with more leading axes; read one at a time."""

    names: frozenset[str]
    read: Callable[[str], Tensor]
    where: str = "activations"

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Activations:
        """Those in memory."""
        return cls(frozenset(tensors), tensors.__getitem__)

    def inputs(self, name: str, size: int) -> Tensor:
        """(tokens, `size`) as stored; AdapterError names what is missing, of another size, too few or not finite."""
        if name not in self.names:
            raise AdapterError(
                f"{self.where}: has no tensor {name}, of the shape (tokens, {size}); loratools neurons lists the names"
            )
        found = self.read(name)
        if not found.is_floating_point() or found.ndim < 2 or found.shape[-1] != size:
            raise AdapterError(
                f"{self.where}: {name} has the shape {tuple(found.shape)} in {found.dtype}, not (tokens, {size})"
            )
        rows = found.reshape(-1, size)
        if len(rows) < 2 or not bool(torch.isfinite(rows).all()):
            problem = "holds NaN or infinity" if len(rows) > 1 else f"has {len(rows)} tokens, too few"
            raise AdapterError(f"{self.where}: {name} {problem}; record the activations again")
        return rows


def load_activations(path: str | os.PathLike[str]) -> Activations:
    """Open a file of activations: a tensor for each bottleneck, under its name."""
    source = open_source(path)
    return Activations(frozenset(source.specs), source.read, printable(source.path))
