"""Comparisons against naive formulas on dense float64 matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ops import compared as naive
from safetensors.torch import save_file

import loratools
from loratools.base_weights import BaseWeights, load_base
from loratools.errors import AdapterError, LoratoolsError, MutatedBaseError, UsageError
from loratools.reports.compare import CompareReport, UpdateNumbers

TOP_K, EPSILON = 4, 0.9
RANKS = {"small": 3, "large": 5, "dora": 4}


@dataclass(frozen=True)
class Case:
    """A base, a whole model and three adapters of it: as files, and as dense deltas by base parameter."""

    base: BaseWeights
    weights: dict[str, naive.Array]
    deltas: dict[str, dict[str, naive.Array]]
    gains: dict[str, naive.Array]
    norms: dict[str, naive.Array]
    report: CompareReport

    @property
    def rows(self) -> list[tuple[str, str, naive.Array, UpdateNumbers]]:
        """(fine-tune, parameter, delta, record), all of them."""
        return [(n, p, d, self.report.targets[p].updates[n]) for n, ds in self.deltas.items() for p, d in ds.items()]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    tensors = naive.base_tensors()
    base = load_base(naive.write_model(folder / "base", tensors, shards=2))
    small, large = naive.factors(RANKS["small"], 1), naive.factors(RANKS["large"], 2, spread=0.4)
    del large["model.layers.1.mlp.up_proj"]  # type: ignore[attr-defined]
    turned = naive.factors(RANKS["dora"], 3)
    magnitudes = {
        target: tensors[f"{target}.weight"].norm(dim=1) * (1 + naive.normal(m, seed=70, spread=0.2))
        for target, (m, _) in naive.SHAPES.items()
    }
    tuned = {name: t + 0.05 * naive.normal(*t.shape, seed=90 + i) for i, (name, t) in enumerate(tensors.items())}
    paths = {
        "small": naive.write_peft(folder / "small", small),
        "full": naive.write_model(folder / "full", tuned, shards=3),
        "large": naive.write_peft(folder / "large", large),
        "dora": naive.write_peft(folder / "dora", turned, magnitudes=magnitudes),
    }
    fine_tunes = {name: loratools.open_fine_tune(path, base) for name, path in paths.items()}
    dora, gains = naive.dora_deltas(tensors, turned, magnitudes)
    names = [f"{target}.weight" for target in naive.SHAPES]
    deltas = {
        "small": naive.lora_deltas(small),
        "full": {n: naive.numpy_of(tuned[n]) - naive.numpy_of(tensors[n]) for n in names},
        "large": naive.lora_deltas(large),
        "dora": dora,
    }
    norms = {
        f"{t}.weight": naive.numpy_of(tensors[f"model.layers.{t.split('.')[2]}.input_layernorm.weight"])
        for t in naive.SHAPES
    }
    report = loratools.compare(base, fine_tunes, top_k=TOP_K, epsilon=EPSILON)
    return Case(base, {n: naive.numpy_of(tensors[n]) for n in names}, deltas, gains, norms, report)


def test_norms_and_spectra_are_those_of_dense_deltas(case: Case) -> None:
    assert set(case.report.targets) == set(case.weights)
    for name, parameter, delta, found in case.rows:
        s = np.linalg.svd(delta, compute_uv=False)
        norm = np.linalg.norm(delta)
        assert found.norm == pytest.approx(norm, rel=1e-6)
        assert found.relative_norm == pytest.approx(norm / np.linalg.norm(case.weights[parameter]), rel=1e-6)
        np.testing.assert_allclose(found.spectrum, s[: len(found.spectrum)], rtol=1e-5)
        assert len(found.spectrum) == RANKS.get(name if name != "dora" else "", min(delta.shape))
        assert found.effective_rank == pytest.approx(naive.effective_rank(s), rel=1e-5)
        assert found.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-6)
        assert found.share == pytest.approx(norm**2 / sum(np.linalg.norm(d) ** 2 for d in case.deltas[name].values()))
        assert (found.rank, found.family) == (RANKS.get(name, 0), {"dora": "dora", "full": "full"}.get(name, "lora"))


def test_the_base_is_told(case: Case) -> None:
    for parameter, target in case.report.targets.items():
        assert target.shape == case.weights[parameter].shape
        assert target.base_norm == pytest.approx(np.linalg.norm(case.weights[parameter]), rel=1e-9)
        np.testing.assert_allclose(target.base_values, np.linalg.svd(case.weights[parameter], compute_uv=False))
        assert f"model.layers.{target.layer}" in parameter
        assert parameter.endswith(f".{target.module}.weight")


def test_energy_lies_in_the_leading_singular_spaces_of_the_base(case: Case) -> None:
    for _, parameter, delta, found in case.rows:
        u, _, vt = naive.thin(case.weights[parameter])
        assert found.energy_left == pytest.approx(naive.share_in(u[:, :TOP_K], delta), rel=1e-5)
        assert found.energy_right == pytest.approx(naive.share_in(vt[:TOP_K].T, delta.T), rel=1e-5)


def test_intruders_are_those_of_dense_svds(case: Case) -> None:
    counts = [(found.left_intruders, found.right_intruders) for *_, found in case.rows]
    assert counts == [naive.intruders(case.weights[p], d, TOP_K, EPSILON) for _, p, d, _ in case.rows]
    assert 0 < sum(left for left, _ in counts) != sum(right for _, right in counts)  # or the test says nothing


def test_gains_are_those_of_the_magnitudes(case: Case) -> None:
    for name, parameter, _, found in case.rows:
        if name != "dora":
            assert found.gain is None
            continue
        gain = case.gains[parameter]
        assert found.gain == pytest.approx((gain.min(), gain.mean(), gain.max()), rel=1e-6)


def test_growth_is_that_of_the_bound_behind_the_norm(case: Case) -> None:
    for _, parameter, delta, found in case.rows:
        if "up_proj" in parameter:
            assert found.logit_growth is None
            continue
        weight, gain = case.weights[parameter], case.norms[parameter]
        wanted = naive.bound(weight + delta, gain) / naive.bound(weight, gain)
        assert found.logit_growth == pytest.approx(wanted, rel=1e-6)
        without = naive.bound(weight + delta, np.ones_like(gain)) / naive.bound(weight, np.ones_like(gain))
        assert found.logit_growth != pytest.approx(without, rel=1e-6)


def naive_pair(a: naive.Array, b: naive.Array, rank: int) -> tuple[float, float, float, float]:
    (u, _, v), (x, _, y) = naive.thin(a), naive.thin(b)
    cosine = float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    overlaps = naive.overlap(u[:, :rank], x[:, :rank]), naive.overlap(v[:rank].T, y[:rank].T)
    return cosine, float(np.linalg.norm(a - b) / np.linalg.norm(a)), *overlaps


def test_pairs_are_those_of_dense_deltas(case: Case) -> None:
    for parameter, target in case.report.targets.items():
        present = [name for name in case.deltas if parameter in case.deltas[name]]
        assert [(p.a, p.b) for p in target.pairs] == [(a, b) for i, a in enumerate(present) for b in present[i + 1 :]]
        for p in target.pairs:
            rank = min(RANKS.get(p.a, 99), RANKS.get(p.b, 99), *target.shape)
            a, b = case.deltas[p.a][parameter], case.deltas[p.b][parameter]
            found = (p.cosine, p.relative_distance, p.output_overlap, p.input_overlap)
            assert found == pytest.approx(naive_pair(a, b, rank), rel=1e-4, abs=1e-7)
            assert p.overlap_rank == rank


def test_pairs_over_all_are_those_of_everything_that_both_change(case: Case) -> None:
    for p in case.report.pairs:
        shared = [n for n in case.deltas[p.a] if n in case.deltas[p.b]]
        a, b = (np.concatenate([case.deltas[x][n].ravel() for n in shared]) for x in (p.a, p.b))
        assert p.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)
        assert p.relative_distance == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-6)
        each = [q for n in shared for q in case.report.targets[n].pairs if (q.a, q.b) == (p.a, p.b)]
        assert p.output_overlap == pytest.approx(np.mean([q.output_overlap for q in each]))
    assert len(case.report.pairs) == 6


def test_what_is_missed_of_the_whole_model(case: Case) -> None:
    for name, parameter, delta, found in case.rows:
        if name == "full":
            assert found.missed is None
            continue
        full, rank = case.deltas["full"][parameter], RANKS[name]
        norm = np.linalg.norm(full)
        u, _, vt = naive.thin(delta)
        inside = u[:, :rank] @ (u[:, :rank].T @ full @ vt[:rank].T) @ vt[:rank]
        assert found.missed is not None
        assert (found.missed.of, found.missed.rank) == ("full", rank)
        assert found.missed.error == pytest.approx(np.linalg.norm(full - delta) / norm, rel=1e-5)
        assert found.missed.space_error == pytest.approx(np.linalg.norm(full - inside) / norm, rel=1e-5)
        s = np.linalg.svd(full, compute_uv=False)
        assert found.missed.best_error == pytest.approx(math.sqrt((s[rank:] ** 2).sum()) / norm, rel=1e-5)
        assert found.missed.best_error < found.missed.space_error < 1


def test_fine_tunes_sum_up_their_matrices(case: Case) -> None:
    report = case.report
    assert list(report.fine_tunes) == list(case.deltas)
    full = case.deltas["full"]
    for name, f in report.fine_tunes.items():
        deltas = case.deltas[name]
        stacked = np.concatenate([d.ravel() for d in deltas.values()])
        bases = np.concatenate([case.weights[n].ravel() for n in deltas])
        records = [report.targets[n].updates[name] for n in deltas]
        assert (f.kind, f.targets) == ("full" if name == "full" else "adapter", len(deltas))
        assert f.norm == pytest.approx(np.linalg.norm(stacked), rel=1e-6)
        assert f.relative_norm == pytest.approx(np.linalg.norm(stacked) / np.linalg.norm(bases), rel=1e-6)
        assert f.mean_effective_rank == pytest.approx(np.mean([u.effective_rank for u in records]))
        assert f.mean_stable_rank == pytest.approx(np.mean([u.stable_rank for u in records]))
        assert f.mean_energy_left == pytest.approx(np.mean([u.energy_left for u in records]))
        assert f.mean_energy_right == pytest.approx(np.mean([u.energy_right for u in records]))
        assert (f.left_intruders, f.right_intruders) == (
            sum(u.left_intruders for u in records),
            sum(u.right_intruders for u in records),
        )
        spectra = np.zeros((len(deltas), 12))
        for row, delta in zip(spectra, deltas.values(), strict=True):
            s = np.linalg.svd(delta, compute_uv=False)
            row[: len(s)] = s
        rms = np.sqrt((spectra**2).mean(axis=0))[: len(f.spectrum)]
        np.testing.assert_allclose(f.spectrum, rms, rtol=1e-5, atol=1e-12)
        for shares, place in ((f.layers, 2), (f.modules, -2)):
            for where, share in shares.items():
                there = [d for n, d in deltas.items() if n.split(".")[place] == where]
                wanted = sum(np.linalg.norm(d) ** 2 for d in there) / np.linalg.norm(stacked) ** 2
                assert share == pytest.approx(wanted, rel=1e-5)
            assert sum(shares.values()) == pytest.approx(1)
        if name == "full":
            assert f.missed is f.untouched is None
            continue
        assert f.missed is not None
        both = np.concatenate([full[n].ravel() for n in deltas])
        assert f.missed.error == pytest.approx(np.linalg.norm(both - stacked) / np.linalg.norm(both), rel=1e-5)
        absent = [n for n in full if n not in deltas]
        wanted = sum(np.linalg.norm(full[n]) ** 2 for n in absent) / sum(np.linalg.norm(d) ** 2 for d in full.values())
        assert f.untouched == pytest.approx(wanted, rel=1e-6)
        assert (f.untouched > 0) == (name == "large")


def test_maps_compare_every_layer_with_every_other(case: Case) -> None:
    maps = case.report.overlap_maps
    assert len({(m.a, m.b, m.module, m.side) for m in maps}) == len(maps) == 6 * 3 * 2
    for m in maps:
        assert m.layers == ("0", "1")
        for i, x in enumerate(m.layers):
            for j, y in enumerate(m.layers):
                names = [next(n for n in case.weights if f".{layer}." in n and m.module in n) for layer in (x, y)]
                a, b = (case.deltas[f].get(n) for f, n in zip((m.a, m.b), names, strict=True))
                if a is None or b is None:
                    assert m.values[i][j] is None
                    continue
                rank = min(RANKS.get(m.a, 99), RANKS.get(m.b, 99), *a.shape)
                (u, _, v), (w, _, z) = naive.thin(a), naive.thin(b)
                sides = (u[:, :rank], w[:, :rank]) if m.side == "output" else (v[:rank].T, z[:rank].T)
                assert m.values[i][j] == pytest.approx(naive.overlap(*sides), abs=1e-5)


def test_what_is_no_matrix_is_listed_with_its_change(case: Case) -> None:
    skipped = case.report.skipped
    assert set(skipped) == {
        "full: model.embed_tokens.weight",
        "full: model.layers.0.input_layernorm.weight",
        "full: model.layers.1.input_layernorm.weight",
    }
    assert skipped["full: model.embed_tokens.weight"].startswith("an embedding table, changed by ")
    assert "no matrix" in skipped["full: model.layers.0.input_layernorm.weight"]


def test_the_report_is_plain_data(case: Case) -> None:
    text = json.dumps(case.report.to_dict(), allow_nan=False)
    assert json.loads(text)["targets"]["model.layers.0.mlp.up_proj.weight"]["updates"]["dora"]["gain"][0] > 0


def test_one_alone_is_mapped_on_itself(tmp_path: Path) -> None:
    base = load_base(naive.write_model(tmp_path / "base", naive.base_tensors()))
    adapter = loratools.load(naive.write_peft(tmp_path / "a", naive.factors(3, 1)))
    report = loratools.compare(base, {"a": adapter})
    assert report.pairs == ()
    assert {(m.a, m.b) for m in report.overlap_maps} == {("a", "a")}
    for m in report.overlap_maps:
        assert m.values[0][0] == pytest.approx(1.0)
        assert m.values[0][1] < 0.999


def two(tmp_path: Path, make: Callable[[], Any], **config: Any) -> tuple[BaseWeights, dict[str, Any]]:
    """A plain adapter on a base, and what `make` writes, both opened."""
    base = load_base(naive.write_model(tmp_path / "base", naive.base_tensors(), **config))
    plain = loratools.load(naive.write_peft(tmp_path / "plain", naive.factors(3, 1)), base=base)
    return base, {"plain": plain, "other": loratools.load(make(), base=base)}


def assert_equal(report: CompareReport) -> None:
    """That both fine-tunes are one."""
    (pair,) = report.pairs
    assert (pair.cosine, pair.output_overlap, pair.input_overlap) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
    assert pair.relative_distance == pytest.approx(0.0, abs=1e-6)
    for target in report.targets.values():
        one, two = target.updates.values()
        np.testing.assert_allclose(one.spectrum[:3], two.spectrum[:3], rtol=1e-5)
        numbers = [(u.norm, u.energy_left, u.energy_right, u.left_intruders, u.logit_growth or 0.0) for u in (one, two)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


def test_the_gauge_of_the_factors_does_not_matter(tmp_path: Path) -> None:
    turn = naive.normal(3, 3, seed=9).double()

    def make() -> Path:
        turned = {
            target: ((up.double() @ turn).float(), (torch.linalg.inv(turn) @ down.double()).float())
            for target, (up, down) in naive.factors(3, 1).items()
        }
        return naive.write_peft(tmp_path / "other", turned)

    report = loratools.compare(*two(tmp_path, make))
    assert len(report.targets) == 6
    assert_equal(report)


def test_dialects_meet_at_the_base(tmp_path: Path) -> None:
    report = loratools.compare(
        *two(tmp_path, lambda: naive.write_kohya(tmp_path / "k.safetensors", naive.factors(3, 1)))
    )
    assert set(report.targets) == {f"{target}.weight" for target in naive.SHAPES}
    assert_equal(report)


def test_the_same_adapter_twice(tmp_path: Path) -> None:
    base, fine_tunes = two(tmp_path, lambda: tmp_path / "plain")
    assert_equal(loratools.compare(base, fine_tunes))


def test_transposed_weights_have_their_outputs_left(tmp_path: Path) -> None:
    tensors = {
        "h.0.attn.c_attn.weight": naive.normal(12, 36, seed=0),
        "h.1.attn.c_attn.weight": naive.normal(12, 36, seed=1),
    }
    base = load_base(naive.write_model(tmp_path / "base", tensors, model_type="gpt2"))
    shapes = {name.removesuffix(".weight"): (36, 12) for name in tensors}
    factors = naive.factors(2, 4, targets=shapes)
    deltas = naive.lora_deltas(factors)
    tuned = {name: t + torch.from_numpy(deltas[name].T).float() for name, t in tensors.items()}
    full = loratools.open_fine_tune(naive.write_model(tmp_path / "full", tuned, model_type="gpt2"), base)
    lora = loratools.open_fine_tune(naive.write_peft(tmp_path / "lora", factors, fan_in_fan_out=True), base)
    report = loratools.compare(base, {"full": full, "lora": lora}, top_k=3)
    for name, target in report.targets.items():
        assert target.shape == (36, 12)
        u, _, vt = naive.thin(naive.numpy_of(tensors[name]).T)
        for update in target.updates.values():
            assert update.energy_left == pytest.approx(naive.share_in(u[:, :3], deltas[name]), rel=1e-4)
            assert update.energy_right == pytest.approx(naive.share_in(vt[:3].T, deltas[name].T), rel=1e-4)
        assert target.updates["lora"].missed is not None
        assert target.updates["lora"].missed.error < 1e-5


@pytest.mark.parametrize("rank", [2, 12])
def test_what_was_extracted_is_the_best_of_its_rank(tmp_path: Path, rank: int) -> None:
    tensors = naive.base_tensors()
    base = load_base(naive.write_model(tmp_path / "base", tensors))
    tuned = {name: t + naive.normal(*t.shape, seed=7, spread=0.1) for name, t in tensors.items()}
    whole = loratools.differences(base, load_base(naive.write_model(tmp_path / "full", tuned)))
    adapter, _ = loratools.extract(whole, rank)
    report = loratools.compare(base, {"lora": adapter, "full": whole.adapter})
    assert report.fine_tunes["full"].kind == "full"
    missed = report.fine_tunes["lora"].missed
    assert missed is not None
    assert missed.error == pytest.approx(missed.best_error, abs=1e-6)
    assert missed.error == pytest.approx(missed.space_error, abs=1e-6)
    assert (missed.error < 1e-6) == (rank == 12)
    assert report.pairs[0].output_overlap == pytest.approx(1.0)


def test_zero_updates_have_numbers_and_no_cosine(tmp_path: Path) -> None:
    zero = {target: (torch.zeros_like(up), down) for target, (up, down) in naive.factors(2, 5).items()}
    base, fine_tunes = two(tmp_path, lambda: naive.write_peft(tmp_path / "zero", zero))
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


def test_a_base_of_zeros_has_no_relative_norm(tmp_path: Path) -> None:
    tensors = naive.base_tensors() | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 12)}
    base = load_base(naive.write_model(tmp_path / "base", tensors))
    adapter = loratools.load(naive.write_peft(tmp_path / "a", naive.factors(3, 1)))
    report = loratools.compare(base, {"a": adapter})
    json.dumps(report.to_dict(), allow_nan=False)
    update = report.targets["model.layers.0.self_attn.q_proj.weight"].updates["a"]
    assert (update.relative_norm, update.logit_growth) == (None, None)


def test_a_pattern_chooses_modules(tmp_path: Path) -> None:
    base, fine_tunes = two(tmp_path, lambda: naive.write_kohya(tmp_path / "k.safetensors", naive.factors(3, 1)))
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


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_growth_grows_with_the_update_and_is_warned_of(tmp_path: Path, scale: float) -> None:
    base = load_base(naive.write_model(tmp_path / "base", naive.base_tensors()))
    adapter = loratools.load(naive.write_peft(tmp_path / "a", naive.factors(3, 1), scale=scale))
    report = loratools.compare(base, {"a": adapter})
    greatest = max(u.logit_growth or 0.0 for t in report.targets.values() for u in t.updates.values())
    assert (greatest > 1.5) == any("grows by more than 1.5" in w for w in report.warnings) == (scale == 20.0)


def growth(tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> CompareReport:
    tensors = naive.base_tensors()
    edit(tensors)
    base = load_base(naive.write_model(tmp_path / "base", tensors, **config))
    return loratools.compare(base, {"a": loratools.load(naive.write_peft(tmp_path / "a", naive.factors(3, 1)))})


def bounds(report: CompareReport, module: str) -> float | None:
    return report.targets[f"model.layers.0.self_attn.{module}.weight"].updates["a"].logit_growth


def naive_growth(scaled: Callable[[naive.Array], naive.Array]) -> float:
    name = "model.layers.0.self_attn.q_proj.weight"
    weight, delta = naive.numpy_of(naive.base_tensors()[name]), naive.lora_deltas(naive.factors(3, 1))[name]
    before, after = (np.linalg.norm(scaled(rows), axis=1).max() for rows in (weight, weight + delta))
    return float(after / before)


NORM = "model.layers.0.input_layernorm"


def test_the_gain_of_gemma_is_one_more(tmp_path: Path) -> None:
    gain = naive.numpy_of(naive.base_tensors()[f"{NORM}.weight"])
    report = growth(tmp_path, lambda tensors: None, model_type="gemma2")
    assert bounds(report, "q_proj") == pytest.approx(naive_growth(lambda rows: rows * (1 + gain)), rel=1e-6)


def test_a_norm_that_centres(tmp_path: Path) -> None:
    gain = naive.numpy_of(naive.base_tensors()[f"{NORM}.weight"])
    centre = np.eye(12) - np.full((12, 12), 1 / 12)
    report = growth(tmp_path, lambda tensors: tensors.update({f"{NORM}.bias": torch.zeros(12)}))
    assert bounds(report, "q_proj") == pytest.approx(naive_growth(lambda rows: (rows * gain) @ centre), rel=1e-6)


def test_no_known_norm_has_gain_one(tmp_path: Path) -> None:
    report = growth(tmp_path, lambda tensors: tensors.pop(f"{NORM}.weight"))  # type: ignore[arg-type, return-value]
    assert bounds(report, "q_proj") == pytest.approx(naive_growth(lambda rows: rows), rel=1e-6)


def test_queries_that_are_normalised_do_not_grow(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    report = growth(tmp_path, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert bounds(report, "q_proj") is None
    assert bounds(report, "k_proj") is not None
    (warning,) = [w for w in report.warnings if "norms of queries and keys" in w]
    assert "1 projections" in warning


def test_equal_singular_values_are_warned_of(tmp_path: Path) -> None:
    tensors = naive.base_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.linalg.qr(naive.normal(20, 12, seed=0)).Q
    base = load_base(naive.write_model(tmp_path / "base", tensors))
    report = loratools.compare(base, {"a": loratools.load(naive.write_peft(tmp_path / "a", naive.factors(3, 1)))})
    assert any(w.startswith("1 of 6 base weights have nearly equal") for w in report.warnings)


def test_what_an_adapter_replaces_is_skipped(tmp_path: Path) -> None:
    def make() -> Path:
        folder = naive.write_peft(tmp_path / "other", naive.factors(2, 5), modules_to_save=["embed_tokens"])
        from safetensors.torch import load_file

        tensors = load_file(folder / "adapter_model.safetensors")
        tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(30, 12)
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    report = loratools.compare(*two(tmp_path, make))
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
    base, fine_tunes = two(tmp_path, lambda: naive.write_peft(tmp_path / "other", made))
    with pytest.raises(error, match=message) as caught:
        loratools.compare(base, fine_tunes)
    assert "\n" not in str(caught.value)


def test_factors_relative_to_another_base_are_refused(tmp_path: Path) -> None:
    pissa = lambda: naive.write_peft(tmp_path / "other", naive.factors(3, 1), init_lora_weights="pissa")  # noqa: E731
    with pytest.raises(MutatedBaseError, match=r"other.*--initial-adapter"):
        loratools.compare(*two(tmp_path, pissa))


@pytest.mark.parametrize(
    ("options", "message"), [({"top_k": 0}, "top_k is 0"), ({"epsilon": 0.0}, "epsilon"), ({"epsilon": 1.5}, "epsilon")]
)
def test_impossible_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    base, fine_tunes = two(tmp_path, lambda: tmp_path / "plain")
    with pytest.raises(UsageError, match=message):
        loratools.compare(base, fine_tunes, **options)
    with pytest.raises(UsageError, match="no fine-tune"):
        loratools.compare(base, {})
