"""Files of PETL-ViT, written number by number after the authors' `save_model`, apart from the code under test."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist

import numpy as np

WIDTH, BLOCKS = 768, 12
METHODS = ("adaptformer", "adaptformer-bihead", "lora", "lora-bihead")


def inner_bounds(bits: int) -> list[float]:
    values = [0.0] * 2**bits
    bounds: list[float] = []
    for _ in range(500):
        bounds = [(a + b) / 2 for a, b in itertools.pairwise(values)]
        edges = [0.0, *(NormalDist().cdf(b) for b in bounds), 1.0]
        values = [NormalDist().inv_cdf((a + b) / 2) for a, b in itertools.pairwise(edges)]
    return bounds


def levels(bits: int) -> list[float]:
    edges = [0.0, *(NormalDist().cdf(b) for b in inner_bounds(bits)), 1.0]
    return [NormalDist().inv_cdf((a + b) / 2) for a, b in itertools.pairwise(edges)]


def shapes(method: str, dim: int, classes: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The quantised layers, in the order in which the authors walk through the model."""
    for block in range(BLOCKS):
        for module in ("attn.lora_q", "attn.lora_v") if "lora" in method else ("adapter_mlp",):
            yield f"blocks.{block}.{module}.adapter_down.weight", (dim, WIDTH)
            yield f"blocks.{block}.{module}.adapter_up.weight", (WIDTH, dim)
    if "bihead" in method:
        yield "head.weight", (classes, WIDTH)


def random_codes(
    method: str, bits: int, dim: int, classes: int, seed: int
) -> dict[str, tuple[np.ndarray, float, float]]:
    """Name -> codes, mean, deviation of every quantised layer."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes(method, dim, classes):
        width = 1 if name.startswith("head") else bits
        moments = np.float32(rng.normal(0, 0.01)), np.float32(rng.uniform(0.01, 0.1))
        found[name] = rng.integers(0, 2**width, shape), float(moments[0]), float(moments[1])
    return found


def encoded(codes: dict[str, tuple[np.ndarray, float, float]], bits: int, head: list[np.ndarray]) -> bytes:
    """The file: each layer's codes, eight, four or two to a byte, its moments, and the head's numbers."""
    out = bytearray()
    for name, (layer, mean, deviation) in codes.items():
        width = 1 if name.startswith("head") else bits
        byte = 0
        for i, code in enumerate(layer.reshape(-1).tolist()):
            place = i % (8 // width)
            byte = code if place == 0 else byte + code * (2**width) ** place
            if place == 8 // width - 1:
                out += byte.to_bytes(1, "big")
        out += struct.pack("f", mean) + struct.pack("f", deviation)
    for part in head:
        for number in part.reshape(-1).tolist():
            out += struct.pack("f", number)
    return bytes(out)


def decoded(codes: dict[str, tuple[np.ndarray, float, float]], bits: int) -> dict[str, np.ndarray]:
    """What the authors' loader makes of the codes, in float32."""
    tables = {width: np.float32(levels(width)) for width in {1, bits}}
    return {
        name: tables[1 if name.startswith("head") else bits][layer] * np.float32(deviation) + np.float32(mean)
        for name, (layer, mean, deviation) in codes.items()
    }


def write(
    folder: Path,
    method: str = "lora",
    *,
    bits: int = 1,
    dim: int = 2,
    classes: int = 3,
    scale: float = 0.1,
    seed: int = 0,
) -> tuple[Path, dict[str, np.ndarray]]:
    """A file with its YAML beside it, and the tensors that it stands for."""
    codes = random_codes(method, bits, dim, classes, seed)
    rng = np.random.default_rng(seed + 1)
    head = [] if "bihead" in method else [np.float32(rng.normal(size=s)) for s in ((classes, WIDTH), (classes,))]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"toy-bit{bits}-dim{dim}.bin"
    path.write_bytes(encoded(codes, bits, head))
    path.with_suffix(".yaml").write_text(
        f"backbone: vit_base_patch16_224_in21k\nbit: {bits}\ndataset: toy\ndim: {dim}\nmethod: {method}\n"
        f"num_class: {classes}\nscale: {scale}\n"
    )
    tensors = decoded(codes, bits)
    if head:
        tensors |= {"head.weight": head[0], "head.bias": head[1]}
    assert math.prod(tensors["head.weight"].shape) == classes * WIDTH
    return path, tensors
