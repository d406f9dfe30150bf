"""Squeezing, judged from the files alone: a naive reader and numpy's dense SVD check what was written and said."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loratools.ops.squeeze as module
from loratools.base_weights import load_base
from loratools.errors import NeedsBaseError, UnchangedError
from loratools.files import load, locate
from loratools.ops.squeeze import Squeeze, squeeze, squeeze_file
from loratools.ranks import Energy, Limits, Threshold

Samples = Callable[[str], Path]
F64 = np.ndarray

PLAIN = [
    "peft/adapter_name_infix", "peft/bias_lora_only", "peft/lora_all_linear", "peft/lora_bias_true",
    "peft/lora_conv2d", "peft/lora_conv_grouped", "peft/lora_embedding", "peft/lora_embedding_saved", "peft/lora_f16",
    "peft/modules_to_save", "peft/moe_target_parameters", "peft/old_bin", "peft/rank_alpha_pattern", "peft/rslora",
    "kohya/flux_bfl/lora.safetensors", "kohya/sd15_pt_pickle/lora.pt", "kohya/sd15_unet_te/lora.safetensors",
    "lycoris/locon/adapter.safetensors", "lycoris/locon_f16/adapter.safetensors",
    "lycoris/locon_norm/adapter.safetensors", "lycoris/locon_tucker/adapter.safetensors",
]  # fmt: skip
ROLES = {
    "lora_A": 0,
    "lora_embedding_A": 0,
    "lora_down": 0,
    "lora_B": 1,
    "lora_embedding_B": 1,
    "lora_up": 1,
    "lora_mid": 2,
}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    weights, _ = locate(path)
    return load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)


def factors_of(path: Path) -> dict[str, dict[int, torch.Tensor]]:
    """Module path as spelt in the file -> its factors."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for key, tensor in tensors_of(path).items():
        match = re.fullmatch(r"(.+?)\.(lora_[A-Za-z_]+)(\.\w+)*", key)
        if match and match[2] in ROLES and not key.endswith(".bias"):
            found.setdefault(match[1], {})[ROLES[match[2]]] = tensor
    return found


def naive(path: Path) -> dict[str, list[F64]]:
    """Module path -> delta as float64 matrices (out, in * kernel): one, or one for each expert or group."""
    _, config_path = locate(path)
    config = json.loads(config_path.read_text()) if config_path else None
    tensors, deltas = tensors_of(path), {}
    for name, factors in factors_of(path).items():
        down, up = factors[0].double().numpy(), factors[1].double().numpy()
        count = 4 if name.endswith((".experts", ".experts.base_layer")) else 1  # of experts, in the one sample with any
        rank = (up.shape[1] if 2 in factors else down.shape[0]) // count
        if config is None:
            alpha = float(tensors[f"{name}.alpha"]) if f"{name}.alpha" in tensors else rank
        else:
            module = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            module += "" if count == 1 else ".gate_up_proj" if name.endswith(".base_layer") else ".down_proj"
            patterns = (config.get("alpha_pattern") or {}).items()
            alpha = next((a for key, a in patterns if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config and config.get("use_rslora") else rank)
        if 2 in factors:
            down = np.einsum("pqkl,qi->pikl", factors[2].double().numpy(), down[:, :, 0, 0])
        left, right = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)
        if count > 1:
            lefts, rights = [left.reshape(len(left), -1, count)[:, :, e] for e in range(count)], np.split(right, count)
        else:
            groups = right.shape[0] // left.shape[1]
            lefts, rights = np.split(left, groups), np.split(right, groups)
        deltas[name] = [scale * le @ ri for le, ri in zip(lefts, rights, strict=True)]
    return deltas


def norm(blocks: list[F64]) -> float:
    return math.hypot(*(float(np.linalg.norm(b)) for b in blocks))


def error(a: list[F64], b: list[F64]) -> float:
    return norm([x - y for x, y in zip(a, b, strict=True)])


def optimum(blocks: list[F64], rank: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """Least error at `rank` per block, energy kept there, and what storing the factors in `dtype` costs alone."""
    left_out, kept, floor = 0.0, 0.0, 0.0
    for block in blocks:
        u, s, vt = np.linalg.svd(block, full_matrices=False)
        left_out, kept = left_out + (s[rank:] ** 2).sum(), kept + (s[:rank] ** 2).sum()
        up, down = u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * vt[:rank]
        stored = [torch.from_numpy(x).to(dtype).double().numpy() for x in (up, down)]
        floor += np.linalg.norm(stored[0] @ stored[1] - up @ down) ** 2
    return math.sqrt(left_out), kept / (kept + left_out), math.sqrt(floor)


def out(source: Path, folder: Path) -> Path:
    return folder / ("out.safetensors" if locate(source)[1] is None else "out")


@pytest.mark.parametrize("mode", ["fold", "keep"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_written_deltas_are_optimal_and_reported_as_they_are(
    samples: Samples, tmp_path: Path, name: str, rank: int, mode: module.ScaleMode
) -> None:
    source = samples(name)
    adapter = load(source)
    saved, report = squeeze_file(
        adapter, out(source, tmp_path), rank, options=Squeeze(scale=mode, allow_unchanged=True)
    )
    before, after = naive(source), naive(saved.path)
    stored = tensors_of(saved.path)
    assert set(report.targets) | set(report.unchanged) == set(adapter) | set(adapter.unsupported)
    if not report.targets:
        assert {e.rank for e in adapter.entries.values()} == {rank}
        return
    assert report.total["targets"] == len(report.targets) + len(report.unchanged)
    squares = [0.0, 0.0, 0.0]
    for target, change in report.targets.items():
        key = adapter.format.spell(target, "up")
        (module,) = (m for m in before if re.fullmatch(rf"{re.escape(m)}\.lora_(B|up|embedding_B)(\..*)?", key))
        blocks = before[module]
        step = len(blocks) if name == "peft/lora_conv_grouped" else 1
        chosen = max(rank // step, 1)
        least, energy, floor = optimum(blocks, chosen, stored[key].dtype)
        found, size = error(blocks, after[module]), norm(blocks)
        assert least * (1 - 1e-9) <= found <= 1.0001 * math.hypot(least, 2 * floor), target
        summed = 1 if stored[key].element_size() > 2 else 1000  # factors of 16 bits are summed in float32
        assert change.relative_error == pytest.approx(found / size, rel=1e-6 * min(summed, 10), abs=1e-9)
        assert change.energy_kept == pytest.approx(energy, rel=1e-9 * summed)
        assert change.rank_after == chosen * step
        assert (change.rank_before, change.bytes_before) == (
            adapter.entries[target].rank,
            adapter.entries[target].nbytes,
        )
        scale = load(saved.path).entries[target].scale
        assert scale == pytest.approx(1.0 if mode == "fold" else adapter.entries[target].scale, rel=1e-6)
        squares = [a + b for a, b in zip(squares, (found**2, size**2, energy * size**2), strict=True)]
    assert report.total["relative_error"] == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-5)
    assert report.total["energy_kept"] == pytest.approx(squares[2] / squares[1], rel=1e-5)
    assert report.total["bytes_before"] == locate(source)[0].stat().st_size
    assert report.total["bytes_after"] == saved.weights.stat().st_size == saved.nbytes
    for target in set(report.unchanged) & set(adapter):
        assert adapter.entries[target].rank <= rank
    assert_carried(adapter, saved.path, set(report.targets))


def assert_carried(adapter: module.Adapter, path: Path, changed: set[str]) -> None:
    """Extras and unchanged targets are there bit for bit; biases are still what they were."""
    again, stored = load(path), tensors_of(path)
    assert set(again) == set(adapter)
    for key, extra in adapter.extras.items():
        assert torch.equal(stored[key], extra.read())
    for target, update in adapter.items():
        if target not in changed:
            assert all(torch.equal(again[target].parameters()[s], t) for s, t in update.parameters().items())
            assert again.entries[target].scale == pytest.approx(update.scale, rel=1e-12)
        bias, after = update.bias_delta(), again[target].bias_delta()
        assert (bias is None) == (after is None)
        if bias is not None and after is not None:
            torch.testing.assert_close(after, bias, rtol=1e-6, atol=1e-8)


def dora_weight(base: F64, low: F64, magnitude: F64, axis: int) -> tuple[F64, F64]:
    """(weight', gain) of DoRA on a (out, in, *kernel) base, the magnitude along `axis`."""
    v = base + low
    sizes = np.sqrt((v**2).sum(axis=tuple(i for i in range(v.ndim) if i != axis), keepdims=True))
    gain = magnitude.reshape([-1 if i == axis else 1 for i in range(v.ndim)]) / sizes
    return gain * v, gain


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", ["peft/dora", "lycoris/locon_dora/adapter.safetensors"])
def test_dora(samples: Samples, tmp_path: Path, name: str, rank: int) -> None:
    """The error is that of diag(gain) B A at its optimum, less what refitted magnitudes win back."""
    source, axis = samples(name), 0 if name == "peft/dora" else 1
    bases = load_file((source if source.is_dir() else source.parent) / "base.safetensors")
    options = Squeeze(base=load_base((source if source.is_dir() else source.parent) / "base.safetensors"))
    adapter = load(source)
    with pytest.raises(NeedsBaseError, match="pass --base"):
        squeeze(adapter, rank)
    saved, report = squeeze_file(adapter, out(source, tmp_path), rank, options=options)
    before, after = naive(source), naive(saved.path)
    for target, change in report.targets.items():
        prefix = re.split(r"\.lora_(B|up)", adapter.format.spell(target, "up"))[0]
        suffix = target.removeprefix("lycoris_").replace("blk_", "blk.")
        base = bases[f"{suffix}.weight"].double().numpy()
        magnitudes = [
            tensors_of(p)[adapter.format.spell(target, "magnitude")].double().numpy() for p in (source, saved.path)
        ]
        low, new = (x[prefix][0].reshape(base.shape) for x in (before, after))
        weight, gain = dora_weight(base, low, magnitudes[0], axis)
        written, _ = dora_weight(base, new, magnitudes[1], axis)
        kept_magnitude, _ = dora_weight(base, new, magnitudes[0], axis)
        scaled = (gain * low).reshape(len(base), -1)
        least, energy, _ = optimum([scaled], rank, torch.float32)
        kept_gain = float(np.linalg.norm(gain * (base + new) - weight))
        assert kept_gain == pytest.approx(least, rel=1e-4)
        found = float(np.linalg.norm(written - weight))
        assert found <= kept_gain * (1 + 1e-6)
        assert found < float(np.linalg.norm(kept_magnitude - weight))
        assert change.relative_error == pytest.approx(found / np.linalg.norm(weight - base), rel=1e-5)
        assert change.energy_kept == pytest.approx(energy, rel=1e-6)
        assert change.rank_after == rank


@pytest.mark.parametrize("name", ["peft/rank_alpha_pattern", "peft/moe_target_parameters", "peft/lora_conv2d"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_energy_is_the_least_rank_that_keeps_it(samples: Samples, tmp_path: Path, name: str, share: float) -> None:
    source = samples(name)
    adapter = load(source)
    saved, report = squeeze_file(adapter, tmp_path / "out", Energy(share), options=Squeeze(allow_unchanged=True))
    for target in adapter:
        prefix = re.split(r"\.lora_(?:embedding_)?B", adapter.format.spell(target, "up"))[0]
        blocks, full = naive(source)[prefix], adapter.entries[target].rank
        energies = [optimum(blocks, k, torch.float32)[1] for k in range(full + 1)]
        wanted = next(k for k in range(1, full + 1) if energies[k] >= share * (1 - 1e-12))
        assert load(saved.path).entries[target].rank == wanted
        assert (target in report.targets) == (wanted < full)


def test_other_policies_and_limits(samples: Samples) -> None:
    adapter = load(samples("peft/lora_all_linear"))
    ranks = {t: e.rank for t, e in squeeze(adapter, Threshold(0.5))[0].entries.items()}
    for target in adapter:
        s = np.linalg.svd(adapter[target].delta().numpy(), compute_uv=False)
        assert ranks[target] == (s > 0.5 * s[0]).sum()
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) == 3
    limited, _ = squeeze(adapter, Threshold(0.5), limits=Limits(maximum=2, uniform=True))
    assert {e.rank for e in limited.entries.values()} == {2}


@pytest.mark.parametrize("rank", [4, 5, 64])
@pytest.mark.parametrize("name", ["peft/lora_plain", "peft/rank_alpha_pattern", "kohya/flux_bfl/lora.safetensors"])
def test_ranks_that_are_not_above_stay_bit_exact(samples: Samples, tmp_path: Path, name: str, rank: int) -> None:
    source = samples(name)
    with pytest.raises(UnchangedError, match=r"nothing to squeeze.*--allow-unchanged"):
        squeeze_file(load(source), out(source, tmp_path), rank)
    assert not out(source, tmp_path).exists()
    saved, report = squeeze_file(load(source), out(source, tmp_path), rank, options=Squeeze(allow_unchanged=True))
    assert not report.targets
    assert (report.total["changed"], report.total["relative_error"]) == (0, 0.0)
    before, after = tensors_of(source), tensors_of(saved.path)
    assert set(before) == set(after)
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert naive(saved.path).keys() == naive(source).keys()
