"""Inspection against dense float64 formulas, written out."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.base_weights import load_base
from loratools.errors import AdapterError
from loratools.files import WEIGHTS_NAME, load
from loratools.ops.inspect import components, inspect, places
from loratools.reports.inspect import TargetNumbers

Samples = Callable[[str], Path]


def write_peft(folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], *, alpha: float) -> Path:
    """An adapter of (A, B) pairs; alpha / rank is its scale."""
    folder.mkdir(parents=True)
    rank = next(iter(pairs.values()))[0].shape[0]
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha}))
    tensors = {}
    for target, (a, b) in pairs.items():
        tensors[f"base_model.model.{target}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{target}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / WEIGHTS_NAME)
    return folder


def assert_numbers(found: TargetNumbers, delta: Tensor) -> None:
    """`found` describes this dense float64 matrix."""
    values = torch.linalg.svdvals(delta)
    squares = values.square()
    whole = float(squares.sum())
    assert found.spectrum == pytest.approx(values[: len(found.spectrum)].tolist(), rel=1e-8)
    assert float(values[len(found.spectrum) :].norm()) < 1e-8
    assert found.norm == pytest.approx(float(delta.norm()), rel=1e-9)
    assert found.spectral_norm == pytest.approx(float(values[0]), rel=1e-9)
    assert found.nuclear_norm == pytest.approx(float(values.sum()), rel=1e-7)
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).nansum())), rel=1e-6)
    assert found.stable_rank == pytest.approx(whole / float(squares[0]), rel=1e-9)
    assert found.energy == pytest.approx({k: float(squares[:k].sum()) / whole for k in found.energy}, rel=1e-9)
    assert list(found.energy)[-1] == found.rank
    enough = [k for k in range(1, len(values) + 1) if float(squares[:k].sum()) >= 0.95 * whole]
    assert found.compressible_rank_95 == enough[0]


def test_rank_stabilised_scale(samples: Samples) -> None:
    path = samples("peft/rslora")
    raw = {k: v.double() for k, v in load_file(path / WEIGHTS_NAME).items()}
    config = json.loads((path / "adapter_config.json").read_text())
    report = inspect(load(path))
    assert len(report.targets) == 4
    for target, numbers in report.targets.items():
        a, b = (raw[f"base_model.model.{target}.lora_{x}.weight"] for x in "AB")
        assert_numbers(numbers, config["lora_alpha"] / math.sqrt(config["r"]) * b @ a)
    assert report.to_dict()["targets"][target]["dtypes"] == {"down": "F32", "up": "F32"}


def test_kohya_convolution(samples: Samples) -> None:
    path = samples("kohya/sd15_unet_te") / "lora.safetensors"
    raw = {k: v.double() for k, v in load_file(path).items()}
    report = inspect(load(path))
    convolutions = [t for t, numbers in report.targets.items() if numbers.shape[2:] == (3, 3)]
    assert convolutions
    for target, numbers in report.targets.items():
        down, up = raw[f"{target}.lora_down.weight"], raw[f"{target}.lora_up.weight"]
        scale = float(raw[f"{target}.alpha"]) / down.shape[0]
        delta = torch.einsum("or,ri...->oi...", up.flatten(1), down) * scale
        assert_numbers(numbers, delta.flatten(1))
    assert report.keys == {"updates": 2 * len(report.targets), "scales": len(report.targets), "extras": 0}


def test_embedding(samples: Samples) -> None:
    path = samples("peft/lora_embedding")
    raw = {k: v.double() for k, v in load_file(path / WEIGHTS_NAME).items()}
    a, b = (raw[f"base_model.model.model.embed_tokens.lora_embedding_{x}"] for x in "AB")
    report = inspect(load(path))
    assert_numbers(report.targets["model.embed_tokens"], 2.0 * (b @ a).T)
    assert report.targets["model.embed_tokens"].layer == "other"


def test_experts_keep_their_rank(samples: Samples) -> None:
    path = samples("peft/moe_target_parameters")
    deltas = load_file(path / "reference_dW.safetensors")
    report = inspect(load(path), nested=True)
    target = "model.layers.0.mlp.experts.gate_up_proj"
    numbers = report.targets[target]
    assert numbers.blocks == deltas[target].shape[0] == 4
    spectra = [torch.linalg.svdvals(expert.double()) for expert in deltas[target]]
    assert numbers.spectrum == pytest.approx(sorted((float(x) for s in spectra for x in s[:4]), reverse=True), rel=1e-4)
    assert numbers.effective_rank <= numbers.rank == 4
    kept, whole = (sum(float(s[:k].square().sum()) for s in spectra) for k in (2, 4))
    assert numbers.energy[2] == pytest.approx(kept / whole, rel=1e-5)
    assert report.nested is not None
    errors = report.nested.targets[target][2]
    assert errors.best == pytest.approx(math.sqrt(1 - kept / whole), rel=1e-5)


def test_grouped_convolution_counts_rank_over_its_groups(samples: Samples) -> None:
    path = samples("peft/lora_conv_grouped")
    raw = load_file(path / WEIGHTS_NAME)
    a, b = (raw[f"base_model.model.gconv.lora_{x}.weight"].double().flatten(1) for x in "AB")
    delta = 2.0 * torch.cat([b[:8] @ a[:2], b[8:] @ a[2:]])  # one block of rows for each group
    numbers = inspect(load(path)).targets["gconv"]
    assert (numbers.rank, numbers.blocks, set(numbers.energy)) == (4, 2, {2, 4})
    spectra = [torch.linalg.svdvals(half)[:2] for half in delta.chunk(2)]
    assert numbers.energy[2] == pytest.approx(
        sum(float(s[0] ** 2) for s in spectra) / float(delta.square().sum()), rel=1e-5
    )
    assert numbers.effective_rank <= 4


def test_norms_relative_to_the_base(samples: Samples) -> None:
    path = samples("peft/dora")
    base, deltas = load_file(path / "base.safetensors"), load_file(path / "reference_dW.safetensors")
    alone, based = inspect(load(path)), inspect(load(path), base=load_base(path / "base.safetensors"))
    assert any("spectrum of the direction" in note for note in alone.warnings)
    for target, numbers in based.targets.items():
        delta, weight = deltas[f"{target}.weight"].double(), base[f"{target}.weight"].double()
        assert numbers.norm == pytest.approx(float(delta.norm()), rel=1e-4)
        assert numbers.relative_norm == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
        assert (numbers.of, alone.targets[target].of) == ("low-rank part", "direction")
        assert alone.targets[target].relative_norm is None
        raw = {k: v.double() for k, v in load_file(path / WEIGHTS_NAME).items()}
        a, b = (raw[f"base_model.model.{target}.lora_{x}.weight"] for x in "AB")
        assert_numbers(alone.targets[target], 2.0 * b @ a)
    plain = samples("peft/lora_plain")
    deltas, base = load_file(plain / "reference_dW.safetensors"), load_file(plain / "base.safetensors")
    for target, numbers in inspect(load(plain), base=load_base(plain / "base.safetensors")).targets.items():
        ratio = deltas[f"{target}.weight"].norm() / base[f"{target}.weight"].norm()
        assert numbers.relative_norm == pytest.approx(float(ratio), rel=1e-5)


def random_pair(seed: int, decay: float, *, r: int = 16, m: int = 40, n: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal u (m, r) and v (n, r), and the spectrum decay^i."""
    gen = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, r, generator=gen, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, r, generator=gen, dtype=torch.float64))[0]
    return u, v, decay ** torch.arange(r, dtype=torch.float64)


def rotation(r: int, seed: int = 3) -> Tensor:
    return torch.linalg.qr(torch.randn(r, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


@pytest.mark.parametrize(
    ("decay", "rotated", "verdict"), [(0.7, False, "nested"), (0.7, True, "not nested"), (1.0, True, "undecided")]
)
def test_ordered_components_are_told_from_rotated_ones(
    tmp_path: Path, decay: float, rotated: bool, verdict: str
) -> None:
    pairs = {}
    for i in range(3):
        u, v, s = random_pair(i, decay)
        q = rotation(16, seed=10 + i) if rotated else torch.eye(16, dtype=torch.float64)
        pairs[f"layers.{i}.q_proj"] = (q.T @ (s.sqrt()[:, None] * v.T), u * s.sqrt() @ q)  # A, B
    report = inspect(load(write_peft(tmp_path / "adapter", pairs, alpha=16)), nested=True)
    assert report.nested is not None
    assert report.nested.verdict == verdict
    squares: dict[int, list[tuple[float, float, float]]] = {}
    for target, rows in report.nested.targets.items():
        a, b = pairs[target]
        delta = b @ a
        spectrum = torch.linalg.svdvals(delta)
        assert list(rows) == [1, 2, 4, 8, 16]
        for k, errors in rows.items():
            prefix = float((delta - b[:, :k] @ a[:k]).square().sum())
            best = float(spectrum[k:].square().sum())
            whole = float(delta.square().sum())
            squares.setdefault(k, []).append((prefix, best, whole))
            assert errors.prefix == pytest.approx(math.sqrt(prefix / whole), rel=1e-9, abs=1e-12)
            assert errors.best == pytest.approx(math.sqrt(best / whole), rel=1e-9, abs=1e-12)
            part = b[:, :k] @ a[:k]
            c = float((delta * part).sum() / part.square().sum())
            assert errors.multiplier == pytest.approx(c, rel=1e-9)
            assert errors.rescaled == pytest.approx(float((delta - c * part).norm() / delta.norm()), rel=1e-6, abs=1e-7)
    for k, rows_k in squares.items():
        prefix, best, whole = (sum(column) for column in zip(*rows_k, strict=True))
        assert report.nested.total[k].prefix == pytest.approx(math.sqrt(prefix / whole), rel=1e-9, abs=1e-12)
        if k < 16:
            assert report.nested.total[k].ratio == pytest.approx(math.sqrt(prefix / best), rel=1e-9)


def test_random_choices_are_averaged_over_all_of_them(tmp_path: Path) -> None:
    gen = torch.Generator().manual_seed(5)
    a, b = torch.randn(5, 9, generator=gen, dtype=torch.float64), torch.randn(7, 5, generator=gen, dtype=torch.float64)
    report = inspect(load(write_peft(tmp_path / "adapter", {"q": (a, b)}, alpha=5)), nested=True)
    assert report.nested is not None
    delta = b @ a
    for k, errors in report.nested.targets["q"].items():
        squares = [float((delta - b[:, list(c)] @ a[list(c)]).square().sum()) for c in combinations(range(5), k)]
        mean = math.sqrt(sum(squares) / len(squares)) / float(delta.norm())
        assert errors.random == pytest.approx(mean, rel=1e-9, abs=1e-12)


def test_components_that_need_another_scale_at_each_rank(tmp_path: Path) -> None:
    # What DyLoRA aims at: at every rank, alpha / k times the first k components is about the whole delta.
    u, v, s = random_pair(1, 0.25)
    a, b = s.sqrt()[:, None] * v.T, u * s.sqrt()
    r = 16
    copies_a, copies_b = a[:4].repeat(4, 1), b[:, :4].repeat(1, 4)
    plain = inspect(load(write_peft(tmp_path / "one", {"q": (copies_a, copies_b)}, alpha=r)), nested=True).nested
    assert plain is not None
    assert plain.total[4].multiplier == pytest.approx(4.0)
    assert plain.total[4].rescaled == pytest.approx(0.0, abs=1e-7)
    assert plain.verdict == "nested up to scale"


def test_groups_add_up(samples: Samples) -> None:
    report = inspect(load(samples("peft/lora_all_linear")))
    assert list(report.layers) == ["0", "1"]
    assert set(report.modules) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for groups in (report.layers, report.modules):
        assert sum(g.targets for g in groups.values()) == report.total.targets == 14
        assert sum(g.parameters for g in groups.values()) == report.footprint.trainable_parameters
        assert math.hypot(*(g.norm for g in groups.values())) == pytest.approx(report.total.norm)
    members = [t for t in report.targets.values() if t.module == "q_proj"]
    q = report.modules["q_proj"]
    assert q.mean_effective_rank == pytest.approx(sum(t.effective_rank for t in members) / 2)
    kept = sum(sum(s * s for s in t.spectrum[:2]) for t in members) / sum(t.norm**2 for t in members)
    assert q.energy[2] == pytest.approx(kept)
    assert q.spectrum[1] == pytest.approx(math.sqrt(sum(t.spectrum[1] ** 2 for t in members) / 2))


def test_footprint_counts_parameters_and_both_units(samples: Samples) -> None:
    path = samples("peft/modules_to_save")
    raw, base = load_file(path / WEIGHTS_NAME), load_file(path / "base.safetensors")
    f = inspect(load(path), base=load_base(path / "base.safetensors")).footprint
    assert f.trainable_parameters + f.other_parameters == sum(t.numel() for t in raw.values())
    assert f.other_parameters == 0  # what replaces a base parameter was trained
    assert f.adam_state.bytes == 8 * f.trainable_parameters
    assert f.gradients.bytes == 4 * f.trainable_parameters
    assert f.base is not None
    assert f.adapter_and_base is not None
    assert f.base.bytes == sum(t.numel() * t.element_size() for t in base.values())
    assert f.adapter_and_base.bytes == f.base.bytes + f.adapter.bytes
    assert f.adapter.to_dict() == {
        "bytes": f.adapter.bytes,
        "mib": f.adapter.bytes / 1048576,
        "mb": f.adapter.bytes / 1e6,
    }


def test_zero_and_nonfinite_updates(tmp_path: Path) -> None:
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 8, generator=gen), torch.randn(6, 4, generator=gen)
    bad = b.clone()
    bad[0, 0] = math.nan
    pairs = {"layers.0.q": (a, b), "layers.1.q": (a.clone(), torch.zeros_like(b)), "layers.2.q": (a.clone(), bad)}
    path = write_peft(tmp_path / "adapter", pairs, alpha=4)
    with pytest.raises(AdapterError, match=r"layers\.2\.q"):
        inspect(load(path))
    report = inspect(load(path), allow_nonfinite=True, nested=True)
    assert report.unmeasured == {"layers.2.q": "holds NaN or infinity"}
    zero = report.targets["layers.1.q"]
    assert (zero.norm, zero.effective_rank, zero.stable_rank, zero.compressible_rank_95) == (0, 0, 0, 0)
    assert report.total.zero == 1
    assert report.total.mean_effective_rank == pytest.approx(report.targets["layers.0.q"].effective_rank)
    assert "layers.1.q" not in (*report.most_compressible, *report.least_compressible)
    assert any("zero updates" in note for note in report.warnings)
    json.dumps(report.to_dict(), allow_nan=False)


def test_an_adapter_of_zeros_alone(tmp_path: Path) -> None:
    pairs = {"q": (torch.ones(2, 8), torch.zeros(6, 2))}
    report = inspect(load(write_peft(tmp_path / "adapter", pairs, alpha=4)), nested=True)
    assert report.total.norm == 0
    assert report.nested is not None
    assert report.nested.verdict == "undecided"
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_pattern_selects_targets(samples: Samples) -> None:
    report = inspect(load(samples("peft/lora_all_linear")), target="q_proj")
    assert list(report.targets) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert report.footprint.trainable_parameters > report.total.parameters


@pytest.mark.parametrize("model", ["sd15_unet", "sdxl_unet", "flux"])
def test_flattened_names_fall_into_the_groups_of_the_dotted_ones(samples: Samples, model: str) -> None:
    names = json.loads(gzip.decompress(samples(f"_keylists/{model}_kohya.json.gz").read_bytes()))
    flat, dotted = places(list(names)), places([entry[0] for entry in names.values()])
    for name, (path, _) in names.items():
        layer, module = dotted[path]
        assert (flat[name][1], flat[name][0].rpartition(".")[2]) == (module, layer.rpartition(".")[2]), name


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.layers.3.self_attn.q_proj", ["model", "layers", "3", "self_attn", "q_proj"]),
        ("q_proj", ["q_proj"]),
        ("fc_1", ["fc_1"]),
        (
            "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k",
            ["unet_down_blocks", "0", "attentions", "1", "transformer_blocks", "0", "attn2", "to_k"],
        ),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", ["te_text_model_encoder_layers", "11", "mlp", "fc1"]),
    ],
)
def test_components_of_a_name(name: str, path: list[str]) -> None:
    assert components(name) == path


def test_layers_keep_apart_what_the_models_keep_apart() -> None:
    found = places(["vision.blocks.0.fc", "text.layers.0.fc", "text.layers.10.fc", "embed"])
    assert [layer for layer, _ in found.values()] == ["vision.blocks.0", "text.layers.0", "text.layers.10", "other"]
