"""Merges against naive dense float64 implementations of every rule."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import loratools
from loratools import Budget, Energy, Fixed, Limits, Merge, load, merge
from loratools.adapter import Adapter
from loratools.errors import AdapterError, NeedsBaseError, UsageError
from loratools.linalg.svd import spectrum
from loratools.operators import Dense, LowRank, Operator
from loratools.ops.merge_methods import dare, knots, ties, tsv, weighted_sum

Matrix = NDArray[np.float64]
Samples = Callable[[str], Path]
PREFIX = "base_model.model."


def peft(
    path: Path,
    seed: int,
    rank: int = 3,
    targets: Sequence[str] = ("layers.0.q", "layers.0.v"),
    *,
    m: int = 14,
    n: int = 10,
    dtype: torch.dtype = torch.float32,
    extra: dict[str, torch.Tensor] | None = None,
    **config: Any,
) -> Adapter:
    """A PEFT adapter of scale 2 on disk, opened."""
    gen = torch.Generator().manual_seed(seed)
    tensors = dict(extra or {})
    for target in targets:
        tensors[f"{PREFIX}{target}.lora_A.weight"] = torch.randn(rank, n, generator=gen).to(dtype)
        tensors[f"{PREFIX}{target}.lora_B.weight"] = torch.randn(m, rank, generator=gen).to(dtype)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(set(targets))}
    (path / "adapter_config.json").write_text(json.dumps(stated | config))
    return load(path)


def dense(adapter: Adapter, target: str) -> Matrix:
    """The delta by its definition, from the stored tensors."""
    assert adapter.origin is not None
    tensors = load_file(adapter.origin.path)
    a, b = (tensors[f"{PREFIX}{target}.lora_{x}.weight"].double().numpy() for x in "AB")
    return np.asarray(2.0 * b @ a)


def stored(adapter: Adapter, target: str) -> Matrix:
    return np.asarray(adapter[target].delta().double().numpy())


def best(matrix: Matrix, rank: int) -> Matrix:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


def naive_ties(deltas: Sequence[Matrix], weights: Sequence[float], density: float) -> Matrix:
    trimmed = []
    for delta, weight in zip(deltas, weights, strict=True):
        keep = np.argsort(-np.abs(delta).ravel())[: int(density * delta.size)]
        mask = np.zeros(delta.size, bool)
        mask[keep] = True
        trimmed.append(np.where(mask.reshape(delta.shape), weight * delta, 0.0))
    out = np.zeros_like(deltas[0])
    for index in np.ndindex(*out.shape):
        values = [t[index] for t in trimmed]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [v for v in values if v * sign > 0]
        out[index] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def naive_knots(deltas: Sequence[Matrix], weights: Sequence[float], density: float) -> Matrix:
    u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    k = int((s > 1e-10 * s[0]).sum())
    n = deltas[0].shape[1]
    parts = [vt[:k, t * n : (t + 1) * n] for t in range(len(deltas))]
    return np.asarray((u[:, :k] * s[:k]) @ naive_ties(parts, weights, density))


def naive_tsv(deltas: Sequence[Matrix], weights: Sequence[float], kept: Sequence[int]) -> Matrix:
    us, ss, vs = [], [], []
    for delta, weight, k in zip(deltas, weights, kept, strict=True):
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        us.append(u[:, :k])
        ss.append(weight * s[:k])
        vs.append(vt[:k].T)

    def whitened(x: Matrix) -> Matrix:  # X (X^T X)^(-1/2)
        values, vectors = np.linalg.eigh(x.T @ x)
        return np.asarray(x @ (vectors / np.sqrt(values)) @ vectors.T)

    u, v = whitened(np.concatenate(us, axis=1)), whitened(np.concatenate(vs, axis=1))
    return np.asarray(u @ np.diag(np.concatenate(ss)) @ v.T)


def ops(count: int, *, m: int = 12, n: int = 9, rank: int = 3, seed: int = 0) -> tuple[list[Operator], list[Matrix]]:
    """Random updates, all low rank but the last, with their matrices."""
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    made: list[Operator] = [LowRank(draw(m, rank + t), draw(rank + t, n), 0.5 + t) for t in range(count - 1)]
    made.append(Dense(draw(m, 2) @ draw(2, n)))
    return made, [op.dense().numpy() for op in made]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, -0.4, 1.5)])
@pytest.mark.parametrize("density", [0.1, 0.35, 1.0])
def test_ties_is_the_naive_one(weights: Sequence[float], density: float) -> None:
    given, matrices = ops(3)
    found = ties(given, weights, density)
    assert found.operator.dense().numpy() == pytest.approx(naive_ties(matrices, weights, density), abs=1e-12)


def test_sign_conflicts_are_counted() -> None:
    a, b = torch.tensor([[4.0, -3.0, 2.0, 0.1]]).double(), torch.tensor([[-4.0, -3.0, 0.1, 2.0]]).double()
    assert ties([Dense(a), Dense(b)], [1, 1], 0.5).sign_conflicts == 0.25  # the first entry alone
    assert ties([Dense(a), Dense(b)], [1, -1], 0.5).sign_conflicts == 0.25  # the second alone


def test_knots_is_the_naive_one() -> None:
    given, matrices = ops(3)
    for density in (0.2, 1.0):
        found = knots(given, (0.6, 0.9, -0.3), density).operator.dense().numpy()
        expected = naive_knots(matrices, (0.6, 0.9, -0.3), density)
        assert np.linalg.norm(found - expected) < 1e-9 * np.linalg.norm(expected)


def test_tsv_is_the_naive_one() -> None:
    given, matrices = ops(3)
    found = tsv(given, (0.6, 0.9, -0.3), 0.7, count=3).operator.dense().numpy()
    expected = naive_tsv(matrices, (0.6, 0.9, -0.3), (2, 2, 1))  # 0.7 of ranks 3, 4 and 2
    assert np.linalg.norm(found - expected) < 1e-9 * np.linalg.norm(expected)


def test_tsv_of_the_same_update_twice_is_that_update() -> None:
    given, matrices = ops(2, rank=3)
    found = tsv([given[0], given[0]], (1.0, 1.0), 1.0, count=2).operator.dense().numpy()
    assert found == pytest.approx(matrices[0], abs=1e-9)


def test_dare_drops_and_rescales_and_is_right_on_average() -> None:
    given, matrices = ops(2)
    for op, matrix in zip(given, matrices, strict=True):
        values = dare([op], (0.5,), 0.25, [3]).operator.dense().numpy()
        ratio = values / (0.5 * matrix)
        assert {round(float(r), 9) for r in ratio.ravel()} == {0.0, 4.0}
    many = [dare(given, (0.7, 0.3), 0.5, [2 * k, 2 * k + 1]).operator.dense().numpy() for k in range(4000)]
    expected = 0.7 * matrices[0] + 0.3 * matrices[1]
    spread = np.std(many, axis=0) / math.sqrt(len(many))
    assert (np.abs(np.mean(many, axis=0) - expected) < 6 * spread + 1e-12).all()


@pytest.mark.parametrize("rule", ["ties", "knots", "tsv"])
def test_no_rule_sees_factors(rule: str) -> None:
    given, _ = ops(2)
    first = given[0]
    assert isinstance(first, LowRank)
    gauge = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    other = LowRank(first.left @ gauge, torch.linalg.solve(gauge, first.right), first.scale)
    rules: dict[str, Callable[[list[Operator]], Operator]] = {
        "ties": lambda d: ties(d, (1, 0.5), 0.3).operator,
        "knots": lambda d: knots(d, (1, 0.5), 0.3).operator,
        "tsv": lambda d: tsv(d, (1, 0.5), 0.5, count=2).operator,
    }
    a, b = rules[rule](given).dense(), rules[rule]([other, given[1]]).dense()
    assert float((a - b).norm()) < 1e-9 * float(a.norm())


def test_a_sum_stays_factored() -> None:
    given, matrices = ops(3)
    low = weighted_sum(given[:2], (0.7, 0.3)).operator
    assert isinstance(low, LowRank)
    assert weighted_sum(given, (1, 2, 3)).operator.dense().numpy() == pytest.approx(
        matrices[0] + 2 * matrices[1] + 3 * matrices[2]
    )
    assert spectrum(low)[6] > 1e-9


def test_a_sum_is_exact_with_ranks_added(tmp_path: Path) -> None:
    a, b = peft(tmp_path / "a", 1, 3), peft(tmp_path / "b", 2, 2)
    merged, report = merge([(a, 0.7), (b, -0.3)])
    for target in a:
        expected = 0.7 * dense(a, target) - 0.3 * dense(b, target)
        row = report.targets[target]
        assert (row.ranks_in, row.rank_out) == ((3, 2), 5)
        assert np.linalg.norm(stored(merged, target) - expected) < 1e-6 * np.linalg.norm(expected)
        assert row.relative_error < 1e-6
        for cosine, delta in zip(row.cosines, (dense(a, target), dense(b, target)), strict=True):
            product = (delta * expected).sum() / (np.linalg.norm(delta) * np.linalg.norm(expected))
            assert cosine == pytest.approx(product, abs=1e-12)
    loratools.save(merged, tmp_path / "out")
    again = load(tmp_path / "out")
    assert loratools.diff(merged, again, tolerance=1e-12).same
    assert again.entries["layers.0.q"].rank == 5


def test_dependent_directions_cost_no_rank(tmp_path: Path) -> None:
    a = peft(tmp_path / "a", 1, 3)
    merged, report = merge([(a, 0.25), (a, 0.75)])
    assert {row.rank_out for row in report.targets.values()} == {3}
    assert stored(merged, "layers.0.q") == pytest.approx(dense(a, "layers.0.q"), rel=1e-5, abs=1e-5)
    cancelled, report = merge([(a, 1.0), (a, -1.0)])
    assert {(row.rank_out, row.relative_error) for row in report.targets.values()} == {(1, 0.0)}
    assert not stored(cancelled, "layers.0.q").any()
    assert report.targets["layers.0.q"].cosines == (None, None)


@pytest.mark.parametrize("method", ["sum", "ties", "knots", "tsv"])
@pytest.mark.parametrize("rank", [1, 4])
def test_each_target_is_the_best_of_its_rank(tmp_path: Path, method: Any, rank: int) -> None:
    a, b = peft(tmp_path / "a", 1, 3, dtype=torch.float64), peft(tmp_path / "b", 2, 2)
    density = None if method == "sum" else 0.5 if method != "tsv" else 1.0
    merged, report = merge([(a, 0.7), (b, 0.3)], rank, options=Merge(method, density))
    for target in a:
        pair = dense(a, target), dense(b, target)
        exact = {
            "sum": lambda p: 0.7 * p[0] + 0.3 * p[1],
            "ties": lambda p: naive_ties(p, (0.7, 0.3), 0.5),
            "knots": lambda p: naive_knots(p, (0.7, 0.3), 0.5),
            "tsv": lambda p: naive_tsv(p, (0.7, 0.3), (3, 2)),
        }[method](pair)
        error = np.linalg.norm(exact - best(exact, rank)) / np.linalg.norm(exact)
        assert report.targets[target].rank_out == rank
        assert report.targets[target].relative_error == pytest.approx(error, abs=1e-7)
        assert np.linalg.norm(stored(merged, target) - best(exact, rank)) < 1e-6 * np.linalg.norm(exact)


def test_rank_rules_apply_to_the_merge(tmp_path: Path) -> None:
    a, b = peft(tmp_path / "a", 1, 4), peft(tmp_path / "b", 2, 4)
    exact = {t: 0.5 * dense(a, t) + 0.5 * dense(b, t) for t in a}
    _, report = merge([(a, 0.5), (b, 0.5)], Energy(0.9))
    for target, row in report.targets.items():
        energy = np.cumsum(np.linalg.svd(exact[target])[1] ** 2) / np.linalg.norm(exact[target]) ** 2
        assert row.rank_out == int((energy < 0.9).sum()) + 1
    _, uniform = merge([(a, 0.5), (b, 0.5)], Energy(0.9), limits=Limits(uniform=True))
    assert {r.rank_out for r in uniform.targets.values()} == {max(r.rank_out for r in report.targets.values())}
    assert a.origin is not None
    size = a.origin.nbytes
    merged, report = merge([(a, 0.5), (b, 0.5)], Budget(size))
    saved = loratools.save(merged, tmp_path / "small")
    assert size * 0.7 < saved.nbytes <= size
    assert {r.rank_out for r in merge([(a, 1), (b, 1)], Fixed(99))[1].targets.values()} == {8}


def test_dare_depends_on_seed_and_name_alone(tmp_path: Path) -> None:
    a = peft(tmp_path / "a", 1, 3, ("layers.0.q", "layers.0.v"))
    b = peft(tmp_path / "b", 2, 3, ("layers.0.q", "layers.0.v"))
    flipped = peft(tmp_path / "c", 2, 3, ("layers.0.q",))
    how = Merge("dare", 0.5, seed=4)
    one, two = merge([(a, 1), (b, 1)], 14, options=how)[0], merge([(a, 1), (flipped, 1)], 14, options=how)[0]
    assert np.array_equal(stored(one, "layers.0.q"), stored(two, "layers.0.q"))
    other = merge([(a, 1), (b, 1)], 14, options=Merge("dare", 0.5, seed=5))[0]
    assert not np.allclose(stored(one, "layers.0.q"), stored(other, "layers.0.q"))
    expected = np.zeros((14, 10))
    for i, adapter in enumerate((a, b)):
        digest = hashlib.sha256(f"4\nlayers_0_q\n{i}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        mask = (torch.rand(14, 10, generator=generator) < 0.5).numpy()
        expected += mask * dense(adapter, "layers.0.q") / 0.5
    assert stored(one, "layers.0.q") == pytest.approx(expected, abs=1e-4)


def test_targets_of_some_adapters_count_as_zero_in_the_rest(tmp_path: Path) -> None:
    a = peft(tmp_path / "a", 1, 3, ("layers.0.q",), layers_to_transform=[0])
    b = peft(tmp_path / "b", 2, 2, ("layers.0.q", "layers.1.v"), dtype=torch.bfloat16)
    merged, report = merge([(a, 0.5), (b, 2.0)])
    assert report.partial == {"layers.1.v": (2,)}
    assert report.targets["layers.1.v"].ranks_in == (None, 2)
    assert any("1 targets are not in all adapters" in warning for warning in report.warnings)
    expected = 2 * dense(b, "layers.1.v")
    assert np.linalg.norm(stored(merged, "layers.1.v") - expected) < 1e-6 * np.linalg.norm(expected)
    loratools.save(merged, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["layers.0.q", "layers.1.v"]
    assert config["layers_to_transform"] is None
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.float32}


def kohya(path: Path, seed: int, modules: Sequence[str], rank: int = 2) -> Adapter:
    gen = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        tensors[f"{module}.lora_down.weight"] = torch.randn(rank, 10, generator=gen)
        tensors[f"{module}.lora_up.weight"] = torch.randn(14, rank, generator=gen)
        tensors[f"{module}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)
    return load(path)


def test_dialects_meet_by_flattened_names(tmp_path: Path) -> None:
    a = peft(tmp_path / "a", 1, 3)
    b = kohya(tmp_path / "b.safetensors", 2, ["layers_0_q", "layers_0_v"])
    exact = 0.5 * dense(a, "layers.0.q") + 0.5 * stored(b, "layers_0_q")
    one, _ = merge([(a, 0.5), (b, 0.5)])
    two, _ = merge([(b, 0.5), (a, 0.5)])
    assert (one.format.name, two.format.name) == ("peft", "kohya")
    assert stored(one, "layers.0.q") == pytest.approx(exact, abs=1e-5)
    assert stored(two, "layers_0_q") == pytest.approx(exact, abs=1e-5)
    c = kohya(tmp_path / "c.safetensors", 2, ["layers_0_q"])
    three, report = merge([(c, 1), (a, 1)])
    assert report.partial == {"layers_0_v": (2,)}
    saved = loratools.save(three, tmp_path / "three.safetensors")
    assert {k.split(".", 1)[0] for k in load_file(saved.weights)} == {"layers_0_q", "layers_0_v"}
    assert loratools.diff(load(saved.weights), three, tolerance=1e-12).same
    d = kohya(tmp_path / "d.safetensors", 2, ["layers_0_q", "layers_0_z"])
    with pytest.raises(AdapterError, match=r"layers_0_z: only in .*d.safetensors.*name that adapter first"):
        merge([(a, 1), (d, 1)])
    with pytest.raises(AdapterError, match=r"none of its targets is named as in .*another dialect"):
        merge([(a, 1), (kohya(tmp_path / "e.safetensors", 2, ["unet_q"]), 1)])


@pytest.mark.parametrize("other", ["peft/loha", "peft/lokr", "peft/rslora", "peft/lora_all_linear"])
@pytest.mark.parametrize("first", [True, False])
def test_families_contribute_their_deltas(samples: Samples, tmp_path: Path, other: str, first: bool) -> None:
    a, b = load(samples("peft/lora_plain")), load(samples(other))
    pairs = [(b, 0.3), (a, 0.7)] if first else [(a, 0.7), (b, 0.3)]
    merged, _ = merge(pairs)
    saved = loratools.save(merged, tmp_path / "out")
    again = load(saved.path)
    assert set(again) == set(a) | set(b)
    for target in again:
        exact = sum(w * x[target].delta().double().numpy() for x, w in pairs if target in x)
        assert np.linalg.norm(stored(again, target) - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "name",
    [
        "peft/lora_conv2d",
        "peft/lora_conv_grouped",
        "peft/lora_embedding",
        "peft/moe_target_parameters",
        "kohya/flux_bfl/lora.safetensors",
        "lycoris/loha/adapter.safetensors",
        "lycoris/lokr_tucker/adapter.safetensors",
        "lycoris/locon_tucker/adapter.safetensors",
    ],
)
@pytest.mark.parametrize("method", ["sum", "ties", "knots", "tsv", "dare"])
def test_every_layout_merges_and_is_written(samples: Samples, tmp_path: Path, name: str, method: Any) -> None:
    a = load(samples(name))
    density = None if method == "sum" else 1.0
    merged, report = merge([(a, 0.5), (a, 0.5)], options=Merge(method, density, extras="first"))
    again = load(loratools.save(merged, tmp_path / "out").path)
    for target in a:
        exact = a[target].delta().double()
        if method in ("ties", "knots"):  # the mean of two halves
            exact = exact / 2
        if method == "tsv":  # keeps at most half of the smaller side of each
            assert report.targets[target].rank_out <= a.entries[target].largest_rank
            continue
        assert float((again[target].delta().double() - exact).norm()) < 1e-5 * float(exact.norm())


def test_dora_needs_and_uses_the_base(samples: Samples, tmp_path: Path) -> None:
    a = load(samples("peft/dora"))
    with pytest.raises(NeedsBaseError, match="--base"):
        merge([(a, 1), (a, 1)])
    gen = torch.Generator().manual_seed(0)
    weights = {f"{t}.weight": torch.randn(e.base_shape, generator=gen) for t, e in a.entries.items() if e.base_shape}
    save_file(weights, tmp_path / "base.safetensors")
    merged, _ = merge([(a, 0.25), (a, 0.5)], options=Merge(base=loratools.load_base(tmp_path / "base.safetensors")))
    again = load(loratools.save(merged, tmp_path / "out").path)
    for target in a:
        exact = 0.75 * a[target].delta(weights[f"{target}.weight"])
        assert {e.family.family for e in again.entries.values()} == {"lora"}
        assert float((again[target].delta() - exact).norm()) < 1e-5 * float(exact.norm())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_dora"] is False


def test_biases_are_summed(samples: Samples, tmp_path: Path) -> None:
    a = load(samples("peft/bias_lora_only"))
    b = load(samples("peft/lora_bias_true"))
    for adapter in (a, b):
        changes = {t: c for t in adapter if (c := adapter[t].bias_delta()) is not None}
        if not changes:
            continue
        merged, _ = merge([(adapter, 2.0), (adapter, -0.5)], options=Merge(extras="first"))
        again = load(loratools.save(merged, tmp_path / "out").path)
        for target, change in changes.items():
            found = again[target].bias_delta()
            assert found is not None
            assert torch.allclose(found, 1.5 * change, rtol=1e-5, atol=1e-7)
        return
    pytest.fail("neither sample changes a bias")


def test_extras_are_carried_refused_taken_or_dropped_never_lost(tmp_path: Path) -> None:
    key = f"{PREFIX}head.weight"
    value = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    a = peft(tmp_path / "a", 1, extra={key: value}, modules_to_save=["head"])
    same = peft(tmp_path / "b", 2, extra={key: value.clone()}, modules_to_save=["head"])
    other = peft(tmp_path / "c", 2, extra={key: value + 1}, modules_to_save=["head"])
    without = peft(tmp_path / "d", 3)
    assert torch.equal(merge([(a, 1), (same, 1)])[0].extras[key].read(), value)
    for pair in ((a, other), (a, without), (without, a)):
        with pytest.raises(AdapterError, match=rf"{key}: .*--drop-extras .*--first-extras"):
            merge([(x, 1) for x in pair])
    taken, report = merge([(a, 1), (other, 1)], options=Merge(extras="first"))
    assert torch.equal(taken.extras[key].read(), value)
    assert report.dropped_extras == ()
    assert merge([(without, 1), (a, 1)], options=Merge(extras="first"))[1].dropped_extras == (key,)
    dropped, report = merge([(a, 1), (other, 1)], options=Merge(extras="drop"))
    assert (dict(dropped.extras), report.dropped_extras) == ({}, (key,))
    assert dropped.config is not None
    assert dropped.config["modules_to_save"] is None


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    a = peft(tmp_path / "a", 1)
    with pytest.raises(AdapterError, match="activated LoRA"):
        merge([(a, 1), (peft(tmp_path / "alora", 2, alora_invocation_tokens=[1, 2]), 1)])
    with pytest.raises(AdapterError, match="init_lora_weights='pissa'"):
        merge([(a, 1), (peft(tmp_path / "pissa", 2, init_lora_weights="pissa"), 1)])
    with pytest.raises(AdapterError, match=r"layers.0.q: \(14, 10\) and \(14, 11\)"):
        merge([(a, 1), (peft(tmp_path / "wide", 2, n=11), 1)])
    with pytest.raises(AdapterError, match="fan_in_fan_out"):
        merge([(a, 1), (peft(tmp_path / "conv1d", 2, fan_in_fan_out=True), 1)])
    bad = peft(
        tmp_path / "nan",
        2,
        extra={
            f"{PREFIX}layers.0.z.lora_A.weight": torch.full((3, 10), math.nan),
            f"{PREFIX}layers.0.z.lora_B.weight": torch.ones(14, 3),
        },
    )
    with pytest.raises(AdapterError, match=r"layers.0.z holds NaN"):
        merge([(a, 1), (bad, 1)])
    with pytest.raises(UsageError, match="at least two"):
        merge([(a, 1)])
    with pytest.raises(UsageError, match="not finite"):
        merge([(a, 1), (a, math.nan)])
    for density in (0.0, 1.5, math.nan):
        with pytest.raises(UsageError, match="density"):
            Merge("ties", density)
    with pytest.raises(UsageError, match="a sum keeps every entry"):
        Merge("sum", 0.5)


def test_other_bases_are_warned_of(tmp_path: Path) -> None:
    a = peft(tmp_path / "a", 1, base_model_name_or_path="one/base")
    b = peft(tmp_path / "b", 2, base_model_name_or_path="two/base")
    assert any("one/base, two/base" in warning for warning in merge([(a, 1), (b, 1)])[1].warnings)
    assert not merge([(a, 1), (a, 1)])[1].warnings


def test_the_record_tells_the_sources(tmp_path: Path) -> None:
    a, b = peft(tmp_path / "a", 1), peft(tmp_path / "b", 2)
    merged, _ = merge([(a, 0.7), (b, 0.3)], 2)
    loratools.save(merged, tmp_path / "out")
    record = json.loads(load(tmp_path / "out").metadata["loratools"])
    hashes = [hashlib.sha256((tmp_path / x / "adapter_model.safetensors").read_bytes()).hexdigest() for x in "ab"]
    assert record["verb"] == "merge"
    assert record["arguments"]["weights"] == [0.7, 0.3]
    assert record["source_sha256"] == hashlib.sha256("\n".join(hashes).encode()).hexdigest()
