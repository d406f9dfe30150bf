"""Comparisons of what is zero, fused, disjoint, damaged or of another base."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ops import compared as naive
from safetensors.torch import load_file, save_file

import loratools
from loratools.base_weights import load_base
from loratools.errors import AdapterError, LoratoolsError, MutatedBaseError, UsageError


def test_zero_updates_have_numbers_and_no_cosine(tmp_path: Path) -> None:
    zero = {target: (torch.zeros_like(up), down) for target, (up, down) in naive.factors(2, 5).items()}
    base, fine_tunes = naive.two(tmp_path, lambda: naive.write_peft(tmp_path / "zero", zero))
    report = loratools.compare(base, fine_tunes)
    json.dumps(report.to_dict(), allow_nan=False)
    update = report.targets["model.layers.0.mlp.up_proj.weight"].updates["other"]
    assert (update.norm, update.effective_rank, update.energy_left, update.left_intruders) == (0, 0, 0, 0)
    for pair in (*report.pairs, *report.targets["model.layers.0.mlp.up_proj.weight"].pairs):
        assert (pair.cosine, pair.output_overlap, pair.relative_distance) == (None, None, pytest.approx(1.0))
    assert any("other: 6 updates are zero" in warning for warning in report.warnings)
    swapped = loratools.compare(base, dict(reversed(fine_tunes.items())))
    assert {p.relative_distance for p in swapped.pairs} == {None}
    assert {p.relative_distance for t in swapped.targets.values() for p in t.pairs} == {None}
    alike = loratools.compare(base, {"one": fine_tunes["other"], "two": fine_tunes["other"]})
    assert [(p.cosine, p.relative_distance) for p in alike.pairs] == [(None, 0.0)]


def test_a_matrix_that_the_first_leaves_counts_in_the_distance(tmp_path: Path) -> None:
    made = dict(naive.factors(2, 5))
    target = "model.layers.0.mlp.up_proj"
    made[target] = (torch.zeros(20, 2), made[target][1])
    base, fine_tunes = naive.two(tmp_path, lambda: naive.write_peft(tmp_path / "other", made))
    (pair,) = loratools.compare(base, dict(reversed(fine_tunes.items()))).pairs
    deltas = naive.lora_deltas(made), naive.lora_deltas(naive.factors(3, 1))
    a, b = (np.concatenate([d[name].ravel() for name in deltas[0]]) for d in deltas)
    assert pair.relative_distance == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-6)
    assert pair.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-6)


def test_a_base_of_zeros_has_no_relative_norm(tmp_path: Path) -> None:
    tensors = naive.base_tensors() | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 12)}
    base = load_base(naive.write_model(tmp_path / "base", tensors))
    adapter = loratools.load(naive.write_peft(tmp_path / "a", naive.factors(3, 1)))
    report = loratools.compare(base, {"a": adapter})
    json.dumps(report.to_dict(), allow_nan=False)
    update = report.targets["model.layers.0.self_attn.q_proj.weight"].updates["a"]
    assert (update.relative_norm, update.logit_growth) == (None, None)


def test_a_pattern_chooses_modules(tmp_path: Path) -> None:
    base, fine_tunes = naive.two(tmp_path, lambda: naive.write_kohya(tmp_path / "k.safetensors", naive.factors(3, 1)))
    steps = []
    report = loratools.compare(base, fine_tunes, target="q_proj", step=lambda: steps.append(1))
    assert list(report.targets) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert len(steps) == 12
    with pytest.raises(AdapterError, match=r"plain.*: changes no matrix that matches 'nothing'"):
        loratools.compare(base, fine_tunes, target="nothing")


def test_fine_tunes_of_other_matrices(tmp_path: Path) -> None:
    base = load_base(naive.write_model(tmp_path / "base", naive.base_tensors()))
    every = naive.factors(3, 1)
    parts = [{t: f for t, f in every.items() if (module in t)} for module in ("q_proj", "up_proj")]
    queries, ups = (loratools.load(naive.write_peft(tmp_path / f"{i}", part)) for i, part in enumerate(parts))
    report = loratools.compare(base, {"queries": queries, "ups": ups})
    (pair,) = report.pairs
    assert (pair.cosine, pair.relative_distance, pair.output_overlap) == (None, None, None)
    assert "queries and ups change no matrix in common" in report.warnings
    assert all(len(target.updates) == 1 for target in report.targets.values())
    assert report.overlap_maps == ()


def test_a_fused_projection_meets_its_parts(tmp_path: Path) -> None:
    parts = ("to_q", "to_k", "to_v")
    path = "transformer_blocks.0.attn"
    tensors = {f"{path}.{part}.weight": naive.normal(12, 12, seed=i) for i, part in enumerate(parts)}
    base = load_base(naive.write_model(tmp_path / "base", tensors))
    up, down = naive.normal(36, 3, seed=5), naive.normal(3, 12, seed=6)
    fused = naive.write_kohya(tmp_path / "fused.safetensors", {"double_blocks.0.img_attn.qkv": (up, down)})
    apart = {f"{path}.{part}": (up[12 * i : 12 * (i + 1)], down) for i, part in enumerate(parts)}
    separate = naive.write_peft(tmp_path / "apart", apart)
    report = loratools.compare(base, {"fused": loratools.load(fused), "apart": loratools.load(separate)})
    assert set(report.targets) == set(tensors)
    for i, part in enumerate(parts):
        target = report.targets[f"{path}.{part}.weight"]
        wanted = 2 * np.linalg.norm(naive.numpy_of(up[12 * i : 12 * (i + 1)] @ down))
        assert [u.norm for u in target.updates.values()] == pytest.approx([wanted, wanted], rel=1e-5)
        assert target.pairs[0].cosine == pytest.approx(1.0)
    keys = loratools.compare(base, {"fused": loratools.load(fused)}, target="to_k")
    assert list(keys.targets) == [f"{path}.to_k.weight"]


def test_equal_singular_values_are_warned_of(tmp_path: Path) -> None:
    tensors = naive.base_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.linalg.qr(naive.normal(20, 12, seed=0)).Q
    base = load_base(naive.write_model(tmp_path / "base", tensors))
    report = loratools.compare(base, {"a": loratools.load(naive.write_peft(tmp_path / "a", naive.factors(3, 1)))})
    assert any(w.startswith("1 of 6 base weights have nearly equal") for w in report.warnings)


def test_what_an_adapter_replaces_is_skipped(tmp_path: Path) -> None:
    def make() -> Path:
        folder = naive.write_peft(tmp_path / "other", naive.factors(2, 5), modules_to_save=["embed_tokens"])
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(30, 12)
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    report = loratools.compare(*naive.two(tmp_path, make))
    assert report.skipped == {"other: model.embed_tokens.weight": "replaces a parameter outright"}


def spoilt(value: float) -> naive.Factors:
    made = dict(naive.factors(3, 1))
    up, _ = made["model.layers.1.self_attn.k_proj"]
    up[2, 1] = value
    return made


def wider(rows: int) -> naive.Factors:
    return naive.factors(3, 1, targets={"model.layers.0.self_attn.q_proj": (rows, 12)})


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (
            spoilt(math.nan),
            AdapterError,
            r"other.*model\.layers\.1\.self_attn\.k_proj: holds NaN or infinity; .*--target",
        ),
        (spoilt(math.inf), AdapterError, "holds NaN or infinity"),
        (
            wider(17),
            AdapterError,
            r"other.*q_proj.* is \(16, 12\) where the adapter has \(17, 12\); is it the right base",
        ),
        (
            naive.factors(3, 1, targets={"transformer.wte": (16, 12)}),
            AdapterError,
            r"other.*transformer\.wte: .*has no parameter transformer\.wte\.weight; is it the right base\?",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(
    tmp_path: Path, made: naive.Factors, error: type[LoratoolsError], message: str
) -> None:
    base, fine_tunes = naive.two(tmp_path, lambda: naive.write_peft(tmp_path / "other", made))
    with pytest.raises(error, match=message) as caught:
        loratools.compare(base, fine_tunes)
    assert "\n" not in str(caught.value)


def test_an_adapter_without_a_matrix_is_refused_with_the_reason(samples: Callable[[str], Path]) -> None:
    folder = samples("lycoris/tlora")
    base = load_base(folder / "base.safetensors")
    adapter = loratools.load(folder / "adapter.safetensors")
    with pytest.raises(AdapterError, match=r"no matrix that can be compared \(x: .*T-LoRA: its delta is relative"):
        loratools.compare(base, {"x": adapter})


def test_two_updates_of_one_matrix_are_refused(tmp_path: Path) -> None:
    shape = (16, 12)
    made = naive.factors(3, 1, targets={f"{top}layers.0.self_attn.q_proj": shape for top in ("", "model.")})
    with pytest.raises(AdapterError, match=r"other.*: another target changes model\.layers\.0\.self_attn\.q_proj"):
        loratools.compare(*naive.two(tmp_path, lambda: naive.write_peft(tmp_path / "other", made)))


def test_factors_relative_to_another_base_are_refused(tmp_path: Path) -> None:
    pissa = lambda: naive.write_peft(tmp_path / "other", naive.factors(3, 1), init_lora_weights="pissa")  # noqa: E731
    with pytest.raises(MutatedBaseError, match=r"other.*--initial-adapter"):
        loratools.compare(*naive.two(tmp_path, pissa))


@pytest.mark.parametrize(
    ("options", "message"), [({"top_k": 0}, "top_k is 0"), ({"epsilon": 0.0}, "epsilon"), ({"epsilon": 1.5}, "epsilon")]
)
def test_impossible_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    base, fine_tunes = naive.two(tmp_path, lambda: tmp_path / "plain")
    with pytest.raises(UsageError, match=message):
        loratools.compare(base, fine_tunes, **options)
    with pytest.raises(UsageError, match="no fine-tune"):
        loratools.compare(base, {})
