"""Intruder dimensions against dense float64 SVDs, the theory's own cases, and mitigation by the formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.adapter import Adapter
from loratools.base_weights import BaseWeights, load_base
from loratools.errors import AdapterError, MutatedBaseError, UnchangedError, UsageError
from loratools.reports.intruders import Count

TARGET = "model.layers.0.q_proj"


def pair(
    folder: Path, weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, **config: Any
) -> tuple[Adapter, BaseWeights]:
    """An adapter of scale 2 on one matrix, and its base."""
    folder.mkdir()
    rank = len(down)
    prefix = f"base_model.model.{TARGET}"
    factors = {f"{prefix}.lora_A.weight": down.contiguous(), f"{prefix}.lora_B.weight": up.contiguous()}
    save_file(factors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file({f"{TARGET}.weight": weight.contiguous()}, folder / "base.safetensors")
    return loratools.load(folder), load_base(folder / "base.safetensors")


def example(folder: Path, strength: float = 4.0, rank: int = 3, **config: Any) -> tuple[Adapter, BaseWeights]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(30, 22, generator=generator) / 22**0.5
    up, down = torch.randn(30, rank, generator=generator), torch.randn(rank, 22, generator=generator)
    return pair(folder, weight, strength * up / 30**0.5, down / 22**0.5, **config)


def dense(adapter: Adapter, base: BaseWeights) -> tuple[np.ndarray, np.ndarray]:
    weight = base.source.read(f"{TARGET}.weight").double().numpy()
    update = adapter[TARGET]
    return weight, update.scale * update.up.double().numpy() @ update.down.double().numpy()  # type: ignore[attr-defined]


def cosines(weight: np.ndarray, tuned: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    u0, _, v0 = np.linalg.svd(weight, full_matrices=False)
    u, _, v = np.linalg.svd(tuned, full_matrices=False)
    return np.abs(u[:, :k].T @ u0), np.abs(v[:k] @ v0.T)


@pytest.mark.parametrize("top_k", [1, 5, 100])
@pytest.mark.parametrize("epsilon", [0.3, 0.5, 0.9])
def test_both_sides_are_those_of_dense_svds(tmp_path: Path, top_k: int, epsilon: float) -> None:
    adapter, base = example(tmp_path / "x")
    weight, change = dense(adapter, base)
    report = loratools.intruders(adapter, base, top_k=top_k, epsilon=epsilon, sweep=True)
    (found,) = report.targets.values()
    for side, naive in zip((found.left, found.right), cosines(weight, weight + change, top_k), strict=True):
        largest = naive.max(axis=1)
        np.testing.assert_allclose(side.max_cosine, largest, atol=1e-5)
        np.testing.assert_allclose(side.matched_cosine, np.diagonal(naive), atol=1e-5)
        assert side.indices == tuple(np.flatnonzero(largest < epsilon))
        assert side.count == len(side.indices)
    s = np.linalg.svd(weight + change, compute_uv=False)[:top_k]
    np.testing.assert_allclose(found.values, s, rtol=1e-5)
    assert found.energy_share == pytest.approx((s[list(found.left.indices)] ** 2).sum() / (s**2).sum(), rel=1e-4)
    assert report.sweep["0.5"]["left"] == sum(c < 0.5 for c in found.left.max_cosine)
    assert report.total["left"] == found.left.count
    k = min(top_k, 22)
    assert report.by_k[f"{k}"] == {"left": found.left.count, "right": found.right.count}
    assert report.by_k["1"]["left"] == (found.left.max_cosine[0] < epsilon)
    assert (found.layer, found.module) == ("0", "q_proj")
    assert report.layers["0"] == report.modules["q_proj"] == Count(1, found.left.count, found.right.count)
    assert set(report.sweep) == {f"0.{i}" for i in range(1, 10)}
    assert set(loratools.intruders(adapter, base, epsilon=epsilon).sweep) == {f"{epsilon:g}"}


@pytest.mark.parametrize(("strength", "count"), [(0.5, 0), (0.9, 0), (2.0, 1), (4.0, 1)])
def test_a_spike_on_noise_intrudes_above_the_transition_alone(tmp_path: Path, strength: float, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    n = 256
    weight = torch.randn(n, n, generator=generator) / n**0.5
    up, down = torch.randn(n, 1, generator=generator), torch.randn(1, n, generator=generator)
    adapter, base = pair(tmp_path / "x", weight, strength / 2 * up / up.norm(), down / down.norm())
    (found,) = loratools.intruders(adapter, base).targets.values()
    assert (found.left.count, found.right.count) == (count, count)


def test_the_gauge_of_the_factors_does_not_matter(tmp_path: Path) -> None:
    adapter, base = example(tmp_path / "x")
    update = adapter[TARGET]
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    up = (update.up.double() @ turn).float()  # type: ignore[attr-defined]
    down = (torch.linalg.inv(turn) @ update.down.double()).float()  # type: ignore[attr-defined]
    other, _ = pair(tmp_path / "y", base.source.read(f"{TARGET}.weight"), up, down)
    (one,), (two,) = (loratools.intruders(a, base).targets.values() for a in (adapter, other))
    np.testing.assert_allclose(one.left.max_cosine, two.left.max_cosine, atol=1e-4)
    assert one.left.indices == two.left.indices


def test_left_is_the_output_side_of_a_transposed_weight(tmp_path: Path) -> None:
    adapter, base = example(tmp_path / "x")
    weight = base.source.read(f"{TARGET}.weight")
    update = adapter[TARGET]
    turned, turned_base = pair(tmp_path / "y", weight.T, update.up, update.down, fan_in_fan_out=True)  # type: ignore[attr-defined]
    (one,), (two,) = (loratools.intruders(a, b).targets.values() for a, b in ((adapter, base), (turned, turned_base)))
    np.testing.assert_allclose(one.left.max_cosine, two.left.max_cosine, atol=1e-5)
    np.testing.assert_allclose(one.right.max_cosine, two.right.max_cosine, atol=1e-5)


def test_an_update_of_nothing_has_no_intruder(tmp_path: Path) -> None:
    adapter, base = example(tmp_path / "x", strength=0.0)
    report = loratools.intruders(adapter, base)
    assert (report.total["left"], report.total["right"]) == (0, 0)
    with pytest.raises(UnchangedError, match="none of 1 matrices has an intruder"):
        loratools.mitigate(adapter, base, 0.5)


def test_equal_singular_values_are_warned_of(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q
    factors = torch.randn(20, 2, generator=generator), torch.randn(2, 20, generator=generator)
    report = loratools.intruders(*pair(tmp_path / "x", orthogonal, *factors))
    assert any("nearly equal" in warning for warning in report.warnings)


@pytest.mark.parametrize("strength", [0.0, 0.75])
@pytest.mark.parametrize("keep_rank", [False, True])
def test_mitigation_is_that_of_the_formula(tmp_path: Path, strength: float, keep_rank: bool) -> None:
    adapter, base = example(tmp_path / "x")
    weight, change = dense(adapter, base)
    u, s, v = np.linalg.svd(weight + change, full_matrices=False)
    chosen = np.flatnonzero(cosines(weight, weight + change, 10)[0].max(axis=1) < 0.5)
    assert len(chosen)
    wanted = change + (strength - 1) * (u[:, chosen] * s[chosen]) @ v[chosen]
    result, report = loratools.mitigate(adapter, base, strength, keep_rank=keep_rank)
    rank = result.entries[TARGET].rank
    assert rank == (3 if keep_rank else 3 + len(chosen))
    if keep_rank:
        a, b, c = np.linalg.svd(wanted, full_matrices=False)
        wanted = (a[:, :3] * b[:3]) @ c[:3]
    found = result[TARGET].delta().double().numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    share = np.linalg.norm(wanted) / np.linalg.norm(change)
    assert report.uniform_shrink == pytest.approx(share, rel=1e-4)
    saved = loratools.save(result, tmp_path / "out")
    np.testing.assert_allclose(loratools.load(saved.path)[TARGET].delta().double().numpy(), found, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"), [({"top_k": 0}, "top_k is 0"), ({"epsilon": 0.0}, "epsilon"), ({"epsilon": 1.5}, "epsilon")]
)
def test_impossible_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loratools.intruders(*example(tmp_path / "x"), **options)


def test_settings_of_mitigation(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a strength of 2"):
        loratools.mitigate(*example(tmp_path / "x"), 2.0)


def test_factors_relative_to_another_base_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MutatedBaseError, match="--initial-adapter"):
        loratools.intruders(*example(tmp_path / "x", init_lora_weights="pissa"))


def test_groups_of_a_convolution_are_not_mitigated(tmp_path: Path) -> None:
    prefix = "base_model.model.conv"
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"{prefix}.lora_A.weight": torch.randn(4, 4, 3, 3, generator=generator),
        f"{prefix}.lora_B.weight": 9 * torch.randn(8, 2, 1, 1, generator=generator),
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["conv"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    save_file({"conv.weight": torch.randn(8, 4, 3, 3, generator=generator)}, tmp_path / "base.safetensors")
    adapter, base = loratools.load(tmp_path), load_base(tmp_path / "base.safetensors")
    assert loratools.intruders(adapter, base).total["targets"] == 1
    with pytest.raises(AdapterError, match="grouped convolution"):
        loratools.mitigate(adapter, base, 0.5)
