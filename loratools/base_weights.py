"""The base model's weights, by parameter name, one at a time."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.configs import read_config
from loratools.errors import AdapterError
from loratools.storage import open_source
from loratools.storage.atomic import printable
from loratools.storage.base import NoTensors

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.storage.base import TensorSource

CONFIG_NAME = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
# What kohya and LyCORIS put before a flattened module path.
_FLAT_PREFIX = re.compile(r"^(lora_unet|lora_te\d?|lora_prior_unet|lora_transformer|lycoris|lora)_")


@dataclass(frozen=True, eq=False)
class BaseWeights:
    """Looks base parameters up by the names that adapters use for them."""

    source: TensorSource
    config: Mapping[str, Any] = field(default_factory=dict)  # the model's own, where it lies beside the weights

    def name_of(self, parameter: str) -> str | None:
        """The stored name of `parameter`: itself, or the only one that ends with it, or that it ends with, at a dot.

        A flattened name stands for the only parameter that flattens to it. None where there is no or no single match.
        """
        names = self.source.specs
        if parameter in names:
            return parameter
        near = [n for n in names if n.endswith(f".{parameter}") or parameter.endswith(f".{n}")]
        leaf = ".bias" if parameter.endswith(".bias") else ".weight"
        if not near and "." not in (module := parameter.removesuffix(leaf)):
            flat = _FLAT_PREFIX.sub("", module)
            stems = {n: n.removesuffix(leaf).replace(".", "_") for n in names if leaf == ".weight" or n.endswith(leaf)}
            near = [n for n in stems if stems[n] == flat] or [n for n in stems if f"_{stems[n]}".endswith(f"_{flat}")]
        return near[0] if len(near) == 1 else None

    def shape_of(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of `parameter`, from the header; None where there is no or no single match."""
        name = self.name_of(parameter)
        return None if name is None else self.source.specs[name].shape

    def bias_of(self, parameter: str) -> Tensor | None:
        """The bias beside the weight `parameter`; None where there is none."""
        name = f"{(self.name_of(parameter) or '').removesuffix('.weight')}.bias"
        return self.source.read(name) if name in self.source.specs else None

    def find(self, parameter: str, shape: tuple[int, ...] | None) -> Tensor:
        """The weight of `parameter`, in the base's own layout.

        `shape` is what the adapter expects, None anything; a matrix fits the convolution that flattens to it.
        AdapterError where the parameter is missing or does not fit.
        """
        name = self.name_of(parameter)
        if name is None:
            raise AdapterError(f"{printable(self.source.path)}: has no parameter {parameter}; is it the right base?")
        tensor = self.source.read(name)
        if shape is None or _fits(tuple(tensor.shape), shape):
            if not _is_finite(tensor):
                raise AdapterError(f"{printable(self.source.path)}: {name} holds NaN or infinity; is the base damaged?")
            return tensor
        raise AdapterError(
            f"{printable(self.source.path)}: {name} is {tuple(tensor.shape)} where the adapter has {shape}; "
            "is it the right base?"
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:
        return bool(torch.isfinite(tensor.float()).all())
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())  # NaN is the least and the greatest


def _fits(base: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    flat = (base[0], math.prod(base[1:])) if base else ()
    return base == shape or _squeezed(base) == _squeezed(shape) or flat == shape


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape


def load_base(path: str | os.PathLike[str]) -> BaseWeights:
    """Open a base model by its headers: a weights file, a folder with one (sharded or not), or its config alone."""
    place = Path(path)
    named = place.suffix == ".json" and not place.name.endswith(".index.json")
    config = place if named else (place if place.is_dir() else place.parent) / CONFIG_NAME
    fields = read_config(config) if named or config.is_file() else {}
    if named or (fields and place.is_dir() and not any(p.suffix in _WEIGHTS for p in place.iterdir())):
        return BaseWeights(NoTensors(config), fields)
    return BaseWeights(open_source(path), fields)
