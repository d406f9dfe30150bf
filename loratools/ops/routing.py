"""What a router of several adapters does: its weights read from a file, its effective experts, and which to keep."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import AdapterError, InputError, UsageError
from loratools.reports.mixture import RouterLayer, RouterReport
from loratools.storage import open_source
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    from torch import Tensor

COLLAPSED = 1.5  # effective experts, below which a router is said to have collapsed
_XLORA_BIAS = re.compile(r"(?:^|\.)internal_xlora_classifier\.layers\.(\d+)\.bias$")
_FORMS = "layers x experts, or samples x layers x experts, as .npy, .json, .csv or .safetensors"


@dataclass(frozen=True, eq=False)
class Routing:
    """Shares of the experts, (samples, layers, experts) in float64; every row sums to 1."""

    shares: Tensor

    @property
    def n_experts(self) -> int:
        return int(self.shares.shape[2])

    @property
    def mass(self) -> Tensor:
        """The mean share of each expert in each layer, (layers, experts)."""
        return self.shares.mean(dim=0)


def routing(weights: Tensor, *, logits: bool = False) -> Routing:
    """Weights of experts, of layers x experts or samples x layers x experts, as shares; one row is one layer.

    With `logits`, what is given goes through a softmax, which is also how the biases of a router count. AdapterError
    for NaN, negative weights, rows without any weight, and other shapes.
    """
    if not 1 <= weights.ndim <= 3 or not weights.numel():
        raise AdapterError(f"routing weights of shape {tuple(weights.shape)}; give {_FORMS}")
    found = weights.double().reshape(*(1,) * (3 - weights.ndim), *weights.shape)
    if not bool(torch.isfinite(found).all()):
        raise AdapterError("the routing weights hold NaN or infinity")
    if logits:
        return Routing(found.softmax(dim=2))
    if bool((found < 0).any()):
        raise AdapterError("the routing weights are negative in places; for logits or biases, pass --logits")
    sums = found.sum(dim=2, keepdim=True)
    if bool((sums == 0).any()):
        raise AdapterError("a row of the routing weights is zero, so no expert is routed to")
    return Routing(found / sums)


def load_routing(path: str | os.PathLike[str], n_experts: int, *, logits: bool = False) -> Routing:
    """Routing weights from a file: .npy, .json, .csv (a layer to a line) or the only tensor of a .safetensors.

    The classifier of PEFT's X-LoRA is read too: the biases of its last layer, which tell what it does before it has
    seen any input. InputError for what cannot be read, AdapterError as `routing`, and where there are not `n_experts`.
    """
    place = Path(path)
    name = printable(place)
    readers = {".npy": _npy, ".json": _json, ".csv": _csv, ".safetensors": _safetensors}
    reader = readers.get(place.suffix.lower())
    if reader is None:
        raise UsageError(f"{name}: cannot be read as routing weights; give {_FORMS}")
    weights, is_bias = reader(place, n_experts)
    try:
        found = routing(weights, logits=logits or is_bias)
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from None
    if found.n_experts != n_experts:
        raise AdapterError(f"{name}: routes between {found.n_experts} experts, and {n_experts} adapters are given")
    return found


def effective_experts(shares: Tensor) -> Tensor:
    """(sum p)^2 / sum p^2 along the last axis: between 1 and the number of experts."""
    return shares.sum(dim=-1).square() / shares.square().sum(dim=-1)


def perplexity(shares: Tensor) -> Tensor:
    """exp of the entropy of p / sum p along the last axis."""
    p = shares / shares.sum(dim=-1, keepdim=True)
    return torch.special.entr(p).sum(dim=-1).exp()


def leading_experts(mass: Tensor, count: int) -> tuple[int, ...]:
    """The `count` experts of most mass, in their order; of equal ones, the first."""
    if not 1 <= count <= len(mass):
        raise UsageError(f"top-k {count} of {len(mass)} experts; give a number from 1 to {len(mass)}")
    order = mass.argsort(descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))


def router_report(found: Routing, top_k: int | None = None) -> RouterReport:
    """What each layer of a router does, and what its `top_k` experts cover; all of them where none is given."""
    count = found.n_experts if top_k is None else top_k
    layers = []
    for layer, mass in enumerate(found.mass):
        shares = found.shares[:, layer]
        ess = float(effective_experts(shares).mean())
        chosen = leading_experts(mass, count)
        layers.append(
            RouterLayer(
                tuple(mass.tolist()),
                ess,
                float(perplexity(shares).mean()),
                float(effective_experts(mass)),
                ess < COLLAPSED and found.n_experts > 1,
                tuple(i + 1 for i in chosen),
                min(1.0, float(mass[list(chosen)].sum())),
            )
        )
    ess, coverage = (math.fsum(getattr(row, name) for row in layers) / len(layers) for name in ("ess", "coverage"))
    return RouterReport(len(found.shares), found.n_experts, tuple(layers), ess, coverage)


def _npy(place: Path, _: int) -> tuple[Tensor, bool]:
    return read_array(place), False


def read_array(place: Path) -> Tensor:
    """The numbers of a .npy file in float64; InputError where there are none. Nothing in it is executed."""
    import numpy as np

    try:
        array = np.load(place, mmap_mode="r", allow_pickle=False)  # a header that promises too much fails here
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{printable(place)}: cannot be read as .npy: {_first_line(error)}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise InputError(f"{printable(place)}: holds no real numbers; write one array with numpy.save")
    return torch.from_numpy(array.astype(np.float64))


def _json(place: Path, _: int) -> tuple[Tensor, bool]:
    try:
        return _tensor(json.loads(place.read_text(encoding="utf-8"))), False
    except (OSError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(
            f"{printable(place)}: holds no nested lists of numbers: {_first_line(error)}; give {_FORMS}"
        ) from None


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, list):
        raise TypeError("the outermost value is no list")
    return torch.tensor(value, dtype=torch.float64)


def _csv(place: Path, _: int) -> tuple[Tensor, bool]:
    rows: list[list[float]] = []
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{printable(place)}: cannot be read: {_first_line(error)}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append([float(cell) for cell in line.split(",")])
        except ValueError:
            raise InputError(f"{printable(place)}, line {number}: is not numbers with commas between them") from None
        if len(rows[-1]) != len(rows[0]):
            raise InputError(f"{printable(place)}, line {number}: {len(rows[-1])} numbers, before it {len(rows[0])}")
    if not rows:
        raise InputError(f"{printable(place)}: holds no numbers; give {_FORMS}")
    return torch.tensor(rows, dtype=torch.float64), False


def _safetensors(place: Path, n_experts: int) -> tuple[Tensor, bool]:
    source = open_source(place)
    biases = {int(match[1]): key for key in source.specs if (match := _XLORA_BIAS.search(key))}
    if biases:
        bias = source.read(biases[max(biases)]).double()
        if bias.ndim != 1 or len(bias) % n_experts:
            raise AdapterError(
                f"{printable(place)}: X-LoRA's classifier ends in {tuple(bias.shape)} numbers, which {n_experts} "
                "experts do not divide"
            )
        return bias.reshape(-1, n_experts), True  # of all layers, or of one that stands for all
    if len(source.specs) != 1:
        raise InputError(
            f"{printable(place)}: holds {len(source.specs)} tensors and no classifier of X-LoRA; give one "
            f"tensor, {_FORMS}"
        )
    return source.read(next(iter(source.specs))).double(), False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
