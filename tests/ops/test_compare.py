"""Comparisons against naive formulas on dense float64 matrices."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from ops import compared as naive

import loratools
from loratools.base_weights import BaseWeights, load_base
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
        values = np.linalg.svd(case.weights[parameter], compute_uv=False)[: case.report.top_k + 1]
        np.testing.assert_allclose(target.base_values, values)
        assert f"model.layers.{target.layer}" in parameter
        assert parameter.endswith(f".{target.module}.weight")


def test_energy_lies_in_the_leading_singular_spaces_of_the_base(case: Case) -> None:
    for _, parameter, delta, found in case.rows:
        u, _, vt = naive.thin(case.weights[parameter])
        assert found.energy_left == pytest.approx(naive.share_in(u[:, :TOP_K], delta), rel=1e-5)
        assert found.energy_right == pytest.approx(naive.share_in(vt[:TOP_K].T, delta.T), rel=1e-5)


def test_intruders_are_those_of_dense_svds(case: Case) -> None:
    counts = [(found.left_intruders, found.right_intruders) for *_, found in case.rows]
    assert counts == [
        naive.intruders(naive.thin(case.weights[p]), case.weights[p] + d, TOP_K, EPSILON) for _, p, d, _ in case.rows
    ]
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
        rows = [(np.linalg.norm(full[n]), u.missed) for n, u in zip(deltas, records, strict=True) if u.missed]
        for kind in ("best_error", "space_error"):
            apart = math.hypot(*(norm * getattr(missed, kind) for norm, missed in rows))
            assert getattr(f.missed, kind) == pytest.approx(apart / np.linalg.norm(both), rel=1e-5)
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

    report = loratools.compare(*naive.two(tmp_path, make))
    assert len(report.targets) == 6
    assert_equal(report)


def test_dialects_meet_at_the_base(tmp_path: Path) -> None:
    report = loratools.compare(
        *naive.two(tmp_path, lambda: naive.write_kohya(tmp_path / "k.safetensors", naive.factors(3, 1)))
    )
    assert set(report.targets) == {f"{target}.weight" for target in naive.SHAPES}
    assert_equal(report)


def test_the_same_adapter_twice(tmp_path: Path) -> None:
    base, fine_tunes = naive.two(tmp_path, lambda: tmp_path / "plain")
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
