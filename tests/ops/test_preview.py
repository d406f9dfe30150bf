"""Previews, judged by numpy's dense SVD and by what squeezing really reports and writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.adapter import Adapter
from loratools.base_weights import load_base
from loratools.errors import LoratoolsError, UsageError
from loratools.files import load
from loratools.ops.diff import diff, diff_target
from loratools.ops.preview import Curve, curve_of, preview
from loratools.ops.spectra import measure
from loratools.ops.squeeze import Squeeze, squeeze, squeeze_file
from loratools.ranks import Elbow, Energy, Fixed, Limits, LocalPolicy, PerTarget, Threshold
from loratools.reports.preview import Preview

Samples = Callable[[str], Path]
SCALE = 1.5


def peft(folder: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], rank: int = 8) -> Path:
    folder.mkdir()
    tensors = {}
    for target, (down, up) in pairs.items():
        tensors[f"base_model.model.{target}.lora_A.weight"] = down
        tensors[f"base_model.model.{target}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": SCALE * rank, "target_modules": ["q", "v"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def pair(seed: int, out: int, inp: int, rank: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inp, generator=generator) * torch.logspace(0, -2, rank)[:, None]
    return down, torch.randn(out, rank, generator=generator)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return peft(tmp_path / "a", {f"layers.{i}.{m}": pair(9 * i + len(m), 20 + i, 30) for i in range(3) for m in "qv"})


def naive(source: Path) -> dict[str, np.ndarray]:
    """Target -> singular values of its dense delta in float64."""
    stored = load_file(source / "adapter_model.safetensors")
    found = {}
    for key, down in stored.items():
        if key.endswith(".lora_A.weight"):
            up = stored[key.replace("lora_A", "lora_B")]
            delta = SCALE * up.double().numpy() @ down.double().numpy()
            found[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = np.linalg.svd(delta)[1]
    return found


def curves(adapter: Adapter) -> tuple[dict[str, Curve], dict[str, str]]:
    found = {m.target: m for m in measure(adapter, allow_nonfinite=True, directions=True)}
    whole = {t: curve_of(adapter.entries[t], m) for t, m in found.items() if m.blocks}
    return whole, {t: "holds NaN or infinity" for t, m in found.items() if not m.blocks}


def shown(adapter: Adapter, policy: LocalPolicy | PerTarget) -> Preview:
    known, unmeasured = curves(adapter)
    return preview(adapter, known, policy, unmeasured=unmeasured)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_errors_are_those_of_the_dense_svd(source: Path, rank: int) -> None:
    spectra = naive(source)
    found = shown(load(source), Fixed(rank))
    lost = {t: float((s[rank:] ** 2).sum()) for t, s in spectra.items()}
    norm = {t: float((s**2).sum()) for t, s in spectra.items()}
    assert found.relative_error == pytest.approx(math.sqrt(sum(lost.values()) / sum(norm.values())), rel=1e-9)
    assert found.energy_kept == pytest.approx(1 - sum(lost.values()) / sum(norm.values()), rel=1e-9)
    for target, one in found.targets.items():
        assert one.relative_error == pytest.approx(math.sqrt(lost[target] / norm[target]), rel=1e-9)
        assert one.energy_kept == pytest.approx(1 - lost[target] / norm[target], rel=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_ranks_for_an_energy_are_the_least_that_keep_it(source: Path, share: float) -> None:
    spectra = naive(source)
    for target, one in shown(load(source), Energy(share)).targets.items():
        kept = np.cumsum(spectra[target] ** 2) / (spectra[target] ** 2).sum()
        assert one.rank_after == int(np.argmax(kept >= share)) + 1


POLICIES: list[LocalPolicy | PerTarget] = [
    Fixed(3),
    Energy(0.9),
    Elbow(),
    Threshold(0.1),
    PerTarget(Fixed(5), {"layers.1.q": Fixed(2), "layers.2.v": Fixed(8)}),
    PerTarget(Energy(0.8), {"layers.0.v": Fixed(6)}),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_what_is_shown_is_what_squeeze_does(source: Path, tmp_path: Path, policy: LocalPolicy | PerTarget) -> None:
    adapter = load(source)
    found = shown(adapter, policy)
    saved, report = squeeze_file(adapter, tmp_path / "out", policy)
    assert found.bytes_before == (source / "adapter_model.safetensors").stat().st_size
    assert found.bytes_after == saved.weights.stat().st_size
    assert found.changed == report.total["changed"]
    assert {t for t, one in found.targets.items() if one.unchanged} == set(report.unchanged)
    for target, change in report.targets.items():
        one = found.targets[target]
        assert (one.rank_before, one.rank_after) == (change.rank_before, change.rank_after)
        assert (one.bytes_before, one.bytes_after) == (change.bytes_before, change.bytes_after)
        assert one.energy_kept == pytest.approx(change.energy_kept, rel=1e-6)
        assert one.relative_error == pytest.approx(change.relative_error, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "peft/rank_alpha_pattern",
        "peft/lora_conv_grouped",
        "peft/moe_target_parameters",
        "peft/modules_to_save",
        "peft/old_bin",
        "kohya/sd15_unet_te/lora.safetensors",
        "lycoris/locon_tucker/adapter.safetensors",
    ],
)
@pytest.mark.parametrize("policy", [Fixed(2), Energy(0.7)], ids=repr)
def test_sizes_are_exact_for_files_of_the_real_libraries(
    samples: Samples, tmp_path: Path, name: str, policy: LocalPolicy
) -> None:
    adapter = load(samples(name))
    found = shown(adapter, policy)
    saved, report = squeeze_file(adapter, tmp_path / "out", policy)
    assert found.bytes_after == saved.nbytes == saved.weights.stat().st_size
    assert {t: one.rank_after for t, one in found.targets.items() if one.unchanged is None} == {
        t: change.rank_after for t, change in report.targets.items()
    }


def test_a_target_of_its_own_rank_is_written_so(source: Path) -> None:
    policy = PerTarget(Fixed(5), {"layers.1.q": Fixed(2)})
    result, report = squeeze(load(source), policy)
    assert {t: e.rank for t, e in result.entries.items()} == dict.fromkeys(naive(source), 5) | {"layers.1.q": 2}
    assert report.targets["layers.1.q"].rank_after == 2
    alone, _ = squeeze(load(source), 2)
    assert torch.equal(result["layers.1.q"].delta(), alone["layers.1.q"].delta())
    limited, _ = squeeze(load(source), policy, limits=Limits(minimum=4))
    assert limited.entries["layers.1.q"].rank == 4


def test_a_rank_for_an_unknown_target_is_refused(source: Path) -> None:
    with pytest.raises(UsageError, match=r"layers\.7\.q"):
        squeeze(load(source), PerTarget(Fixed(5), {"layers.7.q": Fixed(2)}))


def test_before_anything_is_measured(source: Path) -> None:
    adapter = load(source)
    sized = shown(adapter, Fixed(3))
    found = preview(adapter, {}, Fixed(3))
    assert (found.bytes_after, found.changed, found.unmeasured) == (sized.bytes_after, 6, 6)
    assert found.relative_error is None
    assert found.energy_kept is None
    blind = preview(adapter, {}, Energy(0.9))
    assert (blind.bytes_after, blind.changed) == (None, 0)
    assert json.loads(json.dumps(found.to_dict()))["unmeasured"] == 6
    whole, _ = curves(adapter)
    some = preview(adapter, {t: whole[t] for t in list(whole)[:2]}, Fixed(3))
    assert some.unmeasured == 4
    assert some.relative_error == pytest.approx(
        math.sqrt(sum((naive(source)[t][3:] ** 2).sum() for t in list(whole)[:2]) / sum(
            (naive(source)[t] ** 2).sum() for t in list(whole)[:2]
        )),
        rel=1e-9,
    )  # fmt: skip


def test_nan_and_zero(tmp_path: Path) -> None:
    zero = (torch.randn(8, 30), torch.zeros(20, 8))
    broken = (torch.full((8, 30), math.nan), torch.randn(20, 8))
    adapter = load(peft(tmp_path / "a", {"layers.0.q": pair(0, 20, 30), "layers.0.v": broken, "layers.1.q": zero}))
    found = shown(adapter, Fixed(4))
    assert found.targets["layers.0.v"].unchanged == "holds NaN or infinity"
    assert found.targets["layers.0.v"].squared_norm is None
    assert found.targets["layers.1.q"].energy_kept == 1.0
    assert found.targets["layers.1.q"].relative_error == 0.0
    saved, report = squeeze_file(adapter, tmp_path / "out", 4, options=Squeeze(allow_nonfinite=True))
    assert found.bytes_after == saved.nbytes
    assert found.changed == report.total["changed"] == 2
    only = load(peft(tmp_path / "b", {"layers.1.q": zero}))
    assert shown(only, Fixed(4)).relative_error == 0.0


@pytest.mark.parametrize("name", ["peft/dora", "others/litgpt_mha"])
def test_what_a_squeeze_would_refuse_is_said(samples: Samples, tmp_path: Path, name: str) -> None:
    adapter = load(samples(name))
    found = shown(adapter, Fixed(2))
    assert found.changed
    assert found.refused
    assert found.bytes_after is None
    with pytest.raises(LoratoolsError):
        squeeze_file(adapter, tmp_path / "out", 2)


def test_dora_with_its_base(samples: Samples, tmp_path: Path) -> None:
    folder = samples("peft/dora")
    (base,) = (path for path in folder.glob("base*") if path.suffix == ".safetensors" or path.is_dir())
    adapter, weights = load(folder), load_base(base)
    known = {m.target: curve_of(adapter.entries[m.target], m) for m in measure(adapter, base=weights)}
    found = preview(adapter, known, Fixed(2), has_base=True)
    saved, _ = squeeze_file(adapter, tmp_path / "out", 2, options=Squeeze(base=weights))
    assert (found.refused, found.bytes_after) == (None, saved.nbytes)


def test_families_without_ranks_are_carried_over(samples: Samples) -> None:
    found = shown(load(samples("peft/loha")), Fixed(2))
    assert found.changed == 0
    assert all("no ranks" in (one.unchanged or "") for one in found.targets.values())
    assert found.relative_error == 0.0


def test_one_pair_of_targets_is_compared_as_all_are(source: Path) -> None:
    a = load(source)
    b, _ = squeeze(a, 3)
    for target, row in diff(a, b).targets.items():
        assert diff_target(a, b, (target, target)) == row
