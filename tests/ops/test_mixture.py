"""Mixtures of experts against dense float64 matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from loratools import Merge, load, save
from loratools.adapter import Adapter
from loratools.errors import UsageError
from loratools.ops.mixture import Mixture, merge_route_set, mixture, routing_prototypes, write_prototypes
from loratools.ops.routing import routing
from loratools.ops.statistics import Statistics, fingerprint

TARGETS = tuple(f"model.layers.{i}.{module}" for i in (0, 2, 10) for module in ("q_proj", "v_proj"))
PREFIX = "base_model.model."
M, N = 20, 16


def expert(
    path: Path, seed: int, rank: int = 3, targets: Sequence[str] = TARGETS, up: torch.Tensor | None = None
) -> Adapter:
    """A PEFT adapter of scale 2; `up` gives all its targets the same directions."""
    gen = torch.Generator().manual_seed(seed)
    tensors = {}
    for target in targets:
        tensors[f"{PREFIX}{target}.lora_A.weight"] = torch.randn(rank, N, generator=gen)
        drawn = torch.randn(M, rank, generator=gen)
        tensors[f"{PREFIX}{target}.lora_B.weight"] = drawn if up is None else up.clone()
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(stated))
    return load(path)


def dense(adapter: Adapter, target: str) -> NDArray[np.float64]:
    assert adapter.origin is not None
    tensors = load_file(adapter.origin.path)
    a, b = (tensors[f"{PREFIX}{target}.lora_{x}.weight"].double().numpy() for x in "AB")
    return np.asarray(2.0 * b @ a)


@pytest.fixture
def experts(tmp_path: Path) -> list[Adapter]:
    return [expert(tmp_path / f"e{i}", i, rank=2 + i) for i in range(4)]


@pytest.mark.parametrize(("weighting", "weight"), [("mean", 0.5), ("sum", 1.0)])
def test_a_routed_set_is_the_equal_sum_of_its_members(experts: list[Adapter], weighting: str, weight: float) -> None:
    merged, report = merge_route_set(experts, [0, 3], weighting)  # type: ignore[arg-type]
    for target in TARGETS:
        want = weight * (dense(experts[0], target) + dense(experts[3], target))
        found = merged[target].operator().dense().double().numpy()
        assert np.linalg.norm(found - want) <= 1e-6 * np.linalg.norm(want)
        assert report.targets[target].rank_out == 7
    squeezed, _ = merge_route_set(experts, [0, 3], weighting, 2)  # type: ignore[arg-type]
    for target in TARGETS:
        want = weight * (dense(experts[0], target) + dense(experts[3], target))
        values = np.linalg.svd(want, compute_uv=False)
        error = np.linalg.norm(squeezed[target].operator().dense().double().numpy() - want)
        assert error == pytest.approx(math.sqrt((values[2:] ** 2).sum()), rel=1e-5)


def test_sets_may_differ_between_targets(experts: list[Adapter], tmp_path: Path) -> None:
    chosen = {target: (0, 1) if "q_proj" in target else (2,) for target in TARGETS}
    merged, _ = merge_route_set(experts, chosen)
    save(merged, tmp_path / "out")
    again = load(tmp_path / "out")
    for target in TARGETS:
        members = chosen[target]
        want = sum(dense(experts[i], target) for i in members) / len(members)
        found = again[target].operator().dense().double().numpy()
        assert np.linalg.norm(found - want) <= 1e-6 * np.linalg.norm(want)
        assert again.entries[target].rank == (5 if "q_proj" in target else 4)


def test_one_member_is_itself(experts: list[Adapter]) -> None:
    merged, report = merge_route_set(experts, [1])
    want = dense(experts[1], TARGETS[0])
    assert np.abs(merged[TARGETS[0]].operator().dense().double().numpy() - want).max() <= 1e-5 * np.abs(want).max()
    assert report.targets[TARGETS[0]].rank_out == 3


@pytest.mark.parametrize("chosen", [[], [0, 0], [4], [-1], {TARGETS[0]: (9,)}])
def test_wrong_sets_are_refused(experts: list[Adapter], chosen: list[int]) -> None:
    with pytest.raises(UsageError, match="distinct positions"):
        merge_route_set(experts, chosen)


def test_sets_must_name_every_target(experts: list[Adapter]) -> None:
    with pytest.raises(UsageError, match="needs 4 shares"):
        merge_route_set(experts, {TARGETS[0]: (0, 1)})


def test_shares_multiply_weights(experts: list[Adapter]) -> None:
    from loratools import merge

    shares = {target: (1.0, -2.0 if "q_proj" in target else 0.25) for target in TARGETS}
    merged, _ = merge([(experts[0], 0.5), (experts[1], 2.0)], options=Merge(shares=shares))
    for target in TARGETS:
        want = 0.5 * dense(experts[0], target) + 2.0 * shares[target][1] * dense(experts[1], target)
        found = merged[target].operator().dense().double().numpy()
        assert np.linalg.norm(found - want) <= 1e-6 * np.linalg.norm(want)
    with pytest.raises(UsageError, match="finite"):
        merge([(experts[0], 1), (experts[1], 1)], options=Merge(shares=dict.fromkeys(TARGETS, (1.0, math.nan))))


def test_diagnostics_against_dense_svds(experts: list[Adapter]) -> None:
    report, chosen = mixture(experts)
    assert set(chosen.values()) == {(0, 1, 2, 3)}
    shared = {}
    for target in TARGETS:
        deltas = [dense(e, target) for e in experts]
        values = np.linalg.svd(sum(deltas) / 4, compute_uv=False)
        values = values[values > 1e-10 * values[0]]
        p = values / values.sum()
        row = report.targets[target]
        assert row.rank == len(values) == 14
        assert row.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
        assert row.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-6)
        assert row.redundancy == 0.0
        bases = [np.linalg.svd(d)[0][:, : 2 + i] for i, d in enumerate(deltas)]
        for i in range(4):
            for j in range(i):
                value = np.linalg.norm(bases[i].T @ bases[j]) ** 2 / min(2 + i, 2 + j)
                shared.setdefault((i, j), []).append(value)
        own = [values[-1] for values in shared.values()]
        assert row.overlap == pytest.approx(np.mean(own), rel=1e-5)
    for (i, j), values in shared.items():
        assert report.overlaps[i][j] == report.overlaps[j][i] == pytest.approx(np.mean(values), rel=1e-5)
        cosines = [
            np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in ((dense(experts[i], t), dense(experts[j], t)) for t in TARGETS)
        ]
        assert report.cosines[i][j] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert report.warnings == ()


def test_experts_that_are_one_are_told(tmp_path: Path) -> None:
    up = torch.randn(M, 3, generator=torch.Generator().manual_seed(5))
    same = [expert(tmp_path / f"s{i}", i, up=up) for i in range(3)]
    report, _ = mixture(same)
    row = report.targets[TARGETS[0]]
    assert (row.rank, row.overlap) == (3, pytest.approx(1.0))
    assert row.redundancy == pytest.approx(2 / 3)
    assert sum("nearly one expert twice" in w for w in report.warnings) == 3
    assert any("0.67 of the ranks are redundant" in w for w in report.warnings)


def test_gauges_change_nothing(tmp_path: Path, experts: list[Adapter]) -> None:
    gen = torch.Generator().manual_seed(3)

    def turned(adapter: Adapter) -> Adapter:
        def turn(_: str, update: object) -> object:
            q = torch.randn(update.down.shape[0], update.down.shape[0], generator=gen, dtype=torch.float64)  # type: ignore[attr-defined]
            down = torch.linalg.solve(q, update.down.double())  # type: ignore[attr-defined]
            return replace(update, up=(update.up.double() @ q), down=down)  # type: ignore[attr-defined, type-var]

        return adapter.map(turn)  # type: ignore[arg-type]

    plain, _ = mixture(experts)
    other, _ = mixture([turned(adapter) for adapter in experts])
    for target in TARGETS:
        assert other.targets[target].effective_rank == pytest.approx(plain.targets[target].effective_rank, rel=1e-6)
        assert other.targets[target].overlap == pytest.approx(plain.targets[target].overlap, rel=1e-6)


def test_a_router_chooses_by_layer_and_the_change_is_that_of_the_delta(experts: list[Adapter]) -> None:
    shares = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.5, 0.0]])
    means = torch.rand(N, generator=torch.Generator().manual_seed(0)).double() + 0.1
    first = experts[0]
    statistics = Statistics({}, dict.fromkeys(TARGETS, means), 1, {t: fingerprint(first[t]) for t in TARGETS})
    report, chosen = mixture(experts, routing(shares), how=Mixture(2, statistics=statistics))
    sets = {"0": (2, 3), "2": (0, 1), "10": (1, 2)}  # layer 10 is the third, not the second
    for target in TARGETS:
        layer = ("0", "2", "10").index(target.split(".")[2])
        assert chosen[target] == sets[target.split(".")[2]]
        routed = sum(float(shares[layer][i]) * dense(experts[i], target) for i in range(4))
        equal = sum(dense(experts[i], target) for i in chosen[target]) / 2
        change = np.linalg.norm(routed - equal) / np.linalg.norm(routed)
        assert report.targets[target].change == pytest.approx(change, rel=1e-5)
        root = np.sqrt(means.numpy())
        weighted = np.linalg.norm((routed - equal) * root) / np.linalg.norm(routed * root)
        assert report.targets[target].weighted_change == pytest.approx(weighted, rel=1e-5)
    assert report.router is not None
    assert [layer.coverage for layer in report.router.layers] == pytest.approx([0.7, 0.8, 1.0])
    assert report.router.layers[0].chosen == (3, 4)


def test_equal_weights_on_all_experts_change_nothing_of_an_even_router(experts: list[Adapter]) -> None:
    for weighting in ("mean", "sum"):
        report, _ = mixture(experts, routing(torch.ones(4)), how=Mixture(weighting=weighting))  # type: ignore[arg-type]
        assert report.total["change"] == pytest.approx(0.0, abs=1e-12)


def test_one_set_for_all_layers_and_routers_that_do_not_fit(experts: list[Adapter]) -> None:
    rows = torch.eye(4)[[0, 1, 2, 3, 0, 1]] + 0.01  # of six layers, where the adapters have three
    _, chosen = mixture(experts, routing(rows), how=Mixture(2, one_set=True))
    assert set(chosen.values()) == {(0, 1)}
    with pytest.raises(UsageError, match="6 layers and the adapters 3"):
        mixture(experts, routing(rows))
    with pytest.raises(UsageError, match="--router"):
        mixture(experts, how=Mixture(2))
    with pytest.raises(UsageError, match="top-k 5 of 4"):
        mixture(experts, routing(torch.ones(4)), how=Mixture(5))


def test_a_collapsed_router_is_told(experts: list[Adapter]) -> None:
    report, _ = mixture(experts, routing(torch.tensor([0.97, 0.01, 0.01, 0.01])))
    assert any("collapsed in 1 of 1 layers" in w for w in report.warnings)


def test_prototypes_are_the_first_right_singular_vectors(experts: list[Adapter], tmp_path: Path) -> None:
    found = dict(routing_prototypes(experts))
    for target in TARGETS:
        for i, adapter in enumerate(experts):
            want = np.linalg.svd(dense(adapter, target))[2][0]
            assert abs(float(found[target][i] @ torch.from_numpy(want))) == pytest.approx(1.0, abs=1e-8)
    written = load_file(write_prototypes(experts, tmp_path / "p.safetensors"))
    assert written[TARGETS[0]].dtype == torch.float32
    assert torch.allclose(written[TARGETS[0]].double(), found[TARGETS[0]], atol=1e-6)
