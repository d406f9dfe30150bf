"""The linearised view: singular values of the mean Jacobian, against central differences and numpy's SVD."""

from __future__ import annotations

import math
from pathlib import Path

import bottleneck_files as files
import numpy as np
import pytest
import torch
from bottleneck_files import ACTS, LAYOUTS, SIZE, WIDTH, Layout, rand
from torch import Tensor

import loratools
from loratools import Activations
from loratools.errors import NotAWeightDeltaError, UsageError
from loratools.files import load
from loratools.linalg.standard_normal import mean_slope
from loratools.ops.bottleneck import activated

ROWS = 30


def differences(layout: Layout, name: str, tensors: dict[str, Tensor], rows: Tensor) -> np.ndarray:
    """The Jacobian of what is added, by the input after its norm, averaged over the rows; (m, d)."""
    keys = layout.keys(name)
    h = rows.double()
    if "norm.weight" in keys:
        weight, bias = (tensors[keys[f"norm.{p}"]].double() for p in ("weight", "bias"))
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + layout.eps).sqrt() * weight + bias
    plain = {key: t for key, t in tensors.items() if key not in {keys.get("norm.weight"), keys.get("norm.bias")}}
    step, columns = 1e-6, []
    for j in range(SIZE):
        shift = torch.zeros(SIZE, dtype=torch.float64)
        shift[j] = step
        ahead, behind = (files.added(layout, name, plain, x) for x in (h + shift, h - shift))
        columns.append((ahead - behind).mean(0) / (2 * step))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_spectrum_is_that_of_the_mean_jacobian(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    tensors = files.made(layout)
    seen = {each: rand(10 + i, ROWS, SIZE) for i, each in enumerate(layout.names)}
    adapter = load(files.write(tmp_path, layout, tensors))
    report = loratools.neurons(adapter, activations=Activations.of(seen))
    assert report.linearised == "activations"
    for each in layout.names:
        values = np.linalg.svd(differences(layout, each, tensors, seen[each]))[1][:WIDTH]
        row = report.targets[each]
        assert row.singular_values == pytest.approx(values.tolist(), rel=1e-6, abs=1e-7 * values[0])
        assert row.norm == pytest.approx(float(np.linalg.norm(values)), rel=1e-6)
        assert row.stable_rank == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-6)
        energy = np.cumsum(values**2) / (values**2).sum()
        assert row.rank_99 == 1 + int(np.argmax(energy >= 0.99))
        assert (row.width, row.inputs, row.outputs) == (WIDTH, SIZE, SIZE)
        assert row.scale == pytest.approx(layout.scale)


def test_without_activations_z_is_standard_normal(tmp_path: Path) -> None:
    layout = LAYOUTS["pfeiffer"]
    tensors = files.made(layout)
    report = loratools.neurons(load(files.write(tmp_path, layout, tensors)))
    assert report.linearised == "standard normal"
    for name in layout.names:
        keys = layout.keys(name)
        up, down = (tensors[keys[f"{role}.weight"]].double().numpy() for role in ("up", "down"))
        values = np.linalg.svd(0.5 * up @ down)[1][:WIDTH]  # a ReLU lets half through
        assert report.targets[name].singular_values == pytest.approx(values.tolist(), rel=1e-6)


@pytest.mark.parametrize("act", ACTS)
def test_the_mean_slope_is_that_of_the_derivative(act: str) -> None:
    """Against Gauss-Legendre quadrature of a difference quotient, panel by panel between the bends."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    total = 0.0
    for low, high in ((-9.0, -3.0), (-3.0, 0.0), (0.0, 3.0), (3.0, 6.0), (6.0, 9.0)):
        z = (high + low) / 2 + (high - low) / 2 * nodes
        slope = (ACTS[act](z + 1e-6) - ACTS[act](z - 1e-6)) / 2e-6
        total += float((weights * slope * np.exp(-z * z / 2)).sum() * (high - low) / 2) / math.sqrt(2 * math.pi)
    assert mean_slope(lambda z: activated(act, z)) == pytest.approx(total, abs=1e-7)


def test_a_scale_for_each_channel(tmp_path: Path) -> None:
    """AdapterHub's `channel` scaling multiplies the rows of `up`."""
    name = "encoder.layer.0.output.adapters.t"
    layout = Layout((name,), LAYOUTS["pfeiffer"].keys, "relu", file="a.safetensors")
    tensors = files.made(layout) | {f"{name}.scaling": rand(3, SIZE)}
    adapter = load(files.write(tmp_path, layout, tensors))
    row = loratools.neurons(adapter, activation="relu").targets[name]
    up, down = (tensors[layout.keys(name)[f"{role}.weight"]].double().numpy() for role in ("up", "down"))
    scaled = tensors[f"{name}.scaling"].double().numpy()[:, None] * up
    assert row.singular_values == pytest.approx(np.linalg.svd(0.5 * scaled @ down)[1][:WIDTH].tolist(), rel=1e-6)
    assert row.scale is None


def test_removable_units_are_counted_and_a_silent_bottleneck_has_no_rank(tmp_path: Path) -> None:
    layout = LAYOUTS["adaptertune"]
    tensors = files.made(layout)
    keys = layout.keys(layout.names[0])
    tensors[keys["up.weight"]].zero_()  # as training starts
    down = tensors[layout.keys(layout.names[1])["down.weight"]]
    down[0] = 0
    report = loratools.neurons(load(files.write(tmp_path, layout, tensors)))
    silent, other = (report.targets[name] for name in layout.names)
    assert (silent.zero, silent.rank_99, silent.stable_rank, silent.norm) == (WIDTH, 0, 0.0, 0.0)
    assert (other.zero, other.constant, other.duplicates) == (0, 1, 0)
    assert any("the scale is not in the file" in text for text in report.warnings)


def test_what_is_no_bottleneck_is_refused(samples: object, tmp_path: Path) -> None:
    assert callable(samples)
    with pytest.raises(NotAWeightDeltaError, match=r"holds no bottlenecks of plain matrices, but .*prefix tuning"):
        loratools.neurons(load(samples("others/adapters_prefix")))
    layout = LAYOUTS["pfeiffer"]
    files.write(tmp_path, layout, files.made(layout))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match="its activation is not in the file; pass --activation"):
        loratools.neurons(load(tmp_path))
