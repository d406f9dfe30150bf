"""Adapters carried to other bases by weights alone, where the right answer is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from loratools import load, load_base, save
from loratools.adapter import Adapter
from loratools.base_weights import BaseWeights
from loratools.cache import Cache
from loratools.errors import AdapterError, MutatedBaseError, UnchangedError
from loratools.linalg.alignment import Isometry
from loratools.ops.base_spectra import Search
from loratools.ops.depth import depth, pairings, shares_of
from loratools.ops.weight_space import Maps, module_pairs, transfer_weights

Shape = tuple[int, int]
LEAVES: Mapping[str, Shape] = {"self_attn.q_proj": (24, 24), "mlp.up_proj": (40, 24), "mlp.down_proj": (24, 40)}


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(layers: int, leaves: Mapping[str, Shape] = LEAVES, seed: int = 0) -> dict[str, torch.Tensor]:
    found = {
        f"model.layers.{i}.{leaf}.weight": randn(*shape, seed=1000 * seed + 10 * i + j)
        for i in range(layers)
        for j, (leaf, shape) in enumerate(leaves.items())
    }
    return found | {"model.norm.weight": torch.ones(24)}


def saved(tensors: Mapping[str, torch.Tensor], place: Path) -> BaseWeights:
    place.mkdir()
    save_file({k: t.contiguous() for k, t in tensors.items()}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": place.name}))
    return load_base(place)


def factors(layers: int, rank: int = 3, leaves: Mapping[str, Shape] = LEAVES) -> dict[str, torch.Tensor]:
    found = {}
    for i in range(layers):
        for j, (leaf, (m, n)) in enumerate(leaves.items()):
            stem = f"base_model.model.model.layers.{i}.{leaf}"
            found[f"{stem}.lora_A.weight"] = randn(rank, n, seed=7000 + 10 * i + j)
            found[f"{stem}.lora_B.weight"] = randn(m, rank, seed=8000 + 10 * i + j)
    return found


def adapted(tensors: Mapping[str, torch.Tensor], place: Path, rank: int = 3, **config: Any) -> Adapter:
    place.mkdir()
    save_file(dict(tensors), place / "adapter_model.safetensors")
    stated = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 6,
        "target_modules": sorted({k.split(".")[-3] for k in tensors}),
    }
    (place / "adapter_config.json").write_text(json.dumps(stated | config))
    return load(place)


def dense(adapter: Adapter, target: str) -> torch.Tensor:
    parameters = adapter[target].parameters()
    return parameters["up"].double() @ parameters["down"].double() * adapter[target].scale


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return adapted(factors(2), tmp_path / "adapter")


@pytest.fixture
def source(tmp_path: Path) -> BaseWeights:
    return saved(weights(2), tmp_path / "one")


def test_the_same_base_keeps_every_bit(adapter: Adapter, source: BaseWeights, tmp_path: Path) -> None:
    found, report = transfer_weights(adapter, source, saved(weights(2), tmp_path / "other"))
    save(found, tmp_path / "out")
    again = load(tmp_path / "out")
    assert list(again) == list(adapter)
    for target in adapter:
        row = report.targets[target]
        assert (row.method, row.agreement, row.kept, row.origins) == ("same", 1.0, 1.0, {target: 1.0})
        assert row.relative_before == pytest.approx(row.relative_after)
        for slot, tensor in adapter[target].parameters().items():
            assert torch.equal(again[target].parameters()[slot], tensor)
        assert again[target].scale == adapter[target].scale
    assert again.config is not None
    assert again.config["base_model_name_or_path"] == "other"
    assert (report.dropped, report.warnings) == ({}, ())


def test_relatives_keep_the_delta_within_their_own_singular_spaces(
    adapter: Adapter, source: BaseWeights, tmp_path: Path
) -> None:
    near = {name: t + 1e-3 * randn(*t.shape, seed=5) for name, t in weights(2).items()}
    found, report = transfer_weights(adapter, source, saved(near, tmp_path / "near"))
    for target in adapter:
        weight = near[f"{target}.weight"].double()
        u, _, vt = torch.linalg.svd(weight, full_matrices=False)
        delta = dense(adapter, target)
        expected = u @ (u.T @ delta @ vt.T) @ vt
        torch.testing.assert_close(dense(found, target), expected, atol=1e-4, rtol=1e-4)
        row = report.targets[target]
        assert row.method == "projected"
        assert row.agreement is not None
        assert row.agreement > 0.9
        assert row.kept == pytest.approx(float(expected.square().sum() / delta.square().sum()), rel=1e-4)


def test_strangers_go_from_singular_vector_to_singular_vector(
    adapter: Adapter, source: BaseWeights, tmp_path: Path
) -> None:
    other = {name: 3 * t for name, t in weights(2, seed=4).items()}
    found, report = transfer_weights(adapter, source, saved(other, tmp_path / "other"))
    before = weights(2)
    for target, row in report.targets.items():
        assert row.method == "bases"
        one, two = (torch.linalg.svd(w[f"{target}.weight"].double(), full_matrices=False) for w in (before, other))
        core = one.U.T @ dense(adapter, target) @ one.Vh.T
        there = two.U.T @ dense(found, target) @ two.Vh.T
        ratio = float(other[f"{target}.weight"].norm() / before[f"{target}.weight"].norm())
        torch.testing.assert_close(there.abs(), core.abs() * ratio, atol=1e-3, rtol=1e-3)
        kept = float(core.square().sum() / dense(adapter, target).square().sum())
        assert row.kept == pytest.approx(kept, rel=1e-4)
        assert row.relative_after == pytest.approx(row.relative_before * kept**0.5, rel=1e-4)
        assert found[target].parameters()["down"].shape[0] == 3
    assert any("share no coordinates" in warning for warning in report.warnings)


def test_a_permutation_of_channels_is_found_without_data(adapter: Adapter, source: BaseWeights, tmp_path: Path) -> None:
    """Square weights, of which the singular vectors span everything."""
    orders = {name: (torch.randperm(t.shape[0], generator=torch.Generator().manual_seed(i)),
                     torch.randperm(t.shape[-1], generator=torch.Generator().manual_seed(50 + i)))
              for i, (name, t) in enumerate(weights(2).items())}  # fmt: skip
    other = {name: t[orders[name][0]][:, orders[name][1]] if t.ndim == 2 else t for name, t in weights(2).items()}
    found, report = transfer_weights(adapter, source, saved(other, tmp_path / "other"))
    for target in (t for t in adapter if "q_proj" in t):
        rows, columns = orders[f"{target}.weight"]
        assert report.targets[target].method == "bases"
        torch.testing.assert_close(dense(found, target), dense(adapter, target)[rows][:, columns], atol=1e-4, rtol=1e-4)


def test_maps_of_activations_are_applied_to_both_sides(adapter: Adapter, source: BaseWeights, tmp_path: Path) -> None:
    turns: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    other = {}
    for i, (name, t) in enumerate(weights(2).items()):
        if t.ndim == 2:
            p, q = (torch.linalg.qr(randn(k, k, seed=300 + 2 * i + s).double())[0] for s, k in enumerate(t.shape))
            turns[name.removesuffix(".weight")] = p, q
            other[name] = (p @ t.double() @ q.T).float()
        else:
            other[name] = t
    asked = []

    def maps(module: str, destination: str) -> Maps:
        asked.append((module, destination))
        p, q = turns[module]
        return Maps(Isometry(p, torch.eye(len(p)).double()), Isometry(q, torch.eye(len(q)).double()), 1.0)

    there = saved(other, tmp_path / "other")
    found, report = transfer_weights(adapter, source, there, maps=maps)
    assert asked == module_pairs(adapter, source, there)
    for target, row in report.targets.items():
        p, q = turns[target]
        torch.testing.assert_close(dense(found, target), p @ dense(adapter, target) @ q.T, atol=1e-4, rtol=1e-4)
        assert (row.method, row.agreement) == ("activations", 1.0)
        assert row.kept == pytest.approx(1.0)
        assert row.relative_after == pytest.approx(row.relative_before, rel=1e-4)
    with pytest.raises(AdapterError, match="do not fit the weights"):
        transfer_weights(adapter, source, there, maps=lambda *_: Maps(Isometry(p, p), Isometry(p, p), 1.0))


@pytest.mark.parametrize(("before", "after"), [(3, 5), (5, 3), (2, 1), (1, 4), (4, 4), (30, 24)])
def test_layers_are_shared_by_distance(before: int, after: int) -> None:
    for new in range(after):
        place = new * (before - 1) / (after - 1) if after > 1 else (before - 1) / 2
        for layer in range(before):
            expected = max(0.0, 1 - abs(place - layer))
            assert shares_of(layer, before, after).get(new, 0.0) == pytest.approx(expected, abs=1e-12)


def test_other_depths_mix_the_two_nearest_layers(tmp_path: Path) -> None:
    leaves = {"self_attn.q_proj": (24, 24)}
    tensors = factors(3, leaves=leaves)
    for i, factor in enumerate((1.0, 4.0, 2.0)):  # one direction in all layers: no rank is lost
        for key in ("lora_A", "lora_B"):
            stem = "base_model.model.model.layers.{}.self_attn.q_proj." + key + ".weight"
            tensors[stem.format(i)] = tensors[stem.format(0)].clone() * (factor if key == "lora_B" and i else 1.0)
    adapter = adapted(tensors, tmp_path / "adapter")
    source, deeper = saved(weights(3, leaves), tmp_path / "one"), saved(weights(5, leaves, seed=2), tmp_path / "other")
    found, report = transfer_weights(adapter, source, deeper, maps="none")
    whole = dense(adapter, "model.layers.0.self_attn.q_proj")
    for i, factor in enumerate((1.0, 2.5, 4.0, 3.0, 2.0)):
        target = f"model.layers.{i}.self_attn.q_proj"
        torch.testing.assert_close(dense(found, target), factor * whole, atol=1e-4, rtol=1e-4)
        assert report.targets[target].kept == pytest.approx(1.0)
        assert report.targets[target].rank == 3
    assert report.targets["model.layers.1.self_attn.q_proj"].origins == {
        "model.layers.0.self_attn.q_proj": 0.5,
        "model.layers.1.self_attn.q_proj": 0.5,
    }
    back, narrowed = transfer_weights(found, deeper, source, maps="none")
    for i in range(3):
        target = f"model.layers.{i}.self_attn.q_proj"
        torch.testing.assert_close(dense(back, target), dense(adapter, target), atol=1e-3, rtol=1e-4)
    assert len(narrowed.dropped) == 2  # layers 1 and 3 of five fall between those of three
    assert all("no layer falls near it" in why for why in narrowed.dropped.values())


def test_a_mixture_is_cut_to_the_rank_at_the_least_loss(tmp_path: Path) -> None:
    leaves = {"self_attn.q_proj": (24, 24)}
    adapter = adapted(factors(2, leaves=leaves), tmp_path / "adapter")
    source, deeper = saved(weights(2, leaves), tmp_path / "one"), saved(weights(3, leaves), tmp_path / "other")
    found, report = transfer_weights(adapter, source, deeper, maps="none")
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    mixed = (dense(adapter, names[0]) + dense(adapter, names[1])) / 2
    s = torch.linalg.svdvals(mixed)
    error = (dense(found, names[1]) - mixed).square().sum()
    torch.testing.assert_close(error, s[3:].square().sum(), rtol=1e-4, atol=1e-6)
    assert report.targets[names[1]].kept == pytest.approx(float(s[:3].square().sum() / s.square().sum()), rel=1e-4)


def test_layers_that_the_adapter_leaves_alone_count_as_no_change(tmp_path: Path) -> None:
    leaves = {"self_attn.q_proj": (24, 24)}
    tensors = {k: t for k, t in factors(3, leaves=leaves).items() if ".layers.1." in k}
    adapter = adapted(tensors, tmp_path / "adapter")
    source, deeper = saved(weights(3, leaves), tmp_path / "one"), saved(weights(5, leaves), tmp_path / "other")
    found, _ = transfer_weights(adapter, source, deeper, maps="none")
    target = "model.layers.1.self_attn.q_proj"
    assert sorted(found) == [f"model.layers.{i}.self_attn.q_proj" for i in (1, 2, 3)]
    torch.testing.assert_close(dense(found, target), dense(adapter, target) / 2, atol=1e-5, rtol=1e-5)


def test_other_widths(adapter: Adapter, source: BaseWeights, tmp_path: Path) -> None:
    wide = {"self_attn.q_proj": (32, 36), "mlp.up_proj": (20, 36), "mlp.down_proj": (36, 20)}
    other = saved(weights(2, wide, seed=3), tmp_path / "other")
    found, report = transfer_weights(adapter, source, other)
    for target, row in report.targets.items():
        leaf = target.split(".", 3)[3]
        assert row.shape_before == LEAVES[leaf]
        assert row.shape_after == dense(found, target).shape == wide[leaf]
        assert (row.method, row.agreement) == ("bases", None)
        assert 0 < row.kept <= 1
    with pytest.raises(UnchangedError, match="has another shape"):
        transfer_weights(adapter, source, other, maps="none")


def test_what_has_no_counterpart_is_listed(adapter: Adapter, source: BaseWeights, tmp_path: Path) -> None:
    tensors = {k.replace("up_proj", "fc1"): t for k, t in weights(2).items()}
    _, report = transfer_weights(adapter, source, saved(tensors, tmp_path / "other"))
    lost = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert report.dropped == {name: f"the other model has no {name}" for name in lost}
    assert any("2 targets are not in the new adapter" in warning for warning in report.warnings)
    strange = {k.replace("model.layers", "transformer.h"): t for k, t in weights(2).items()}
    with pytest.raises(UnchangedError, match=r"nothing can be carried over; .*: the other model has no layers"):
        transfer_weights(adapter, source, saved(strange, tmp_path / "strange"))


def test_what_is_no_product_of_factors_is_listed(source: BaseWeights, tmp_path: Path) -> None:
    tensors = factors(2)
    for i in range(2):
        stem = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        tensors[f"{stem}.lora_magnitude_vector"] = torch.ones(24)
    adapter = adapted(tensors, tmp_path / "dora", use_dora=True)
    _, report = transfer_weights(adapter, source, saved(weights(2, seed=2), tmp_path / "other"))
    dora = [t for t in adapter if "q_proj" in t]
    assert all("convert it to LoRA first" in report.dropped[t] for t in dora)
    assert not set(dora) & set(report.targets)


def test_extras_and_biases_are_listed(source: BaseWeights, tmp_path: Path) -> None:
    tensors = factors(2) | {"base_model.model.model.norm.weight": torch.ones(24)}
    adapter = adapted(tensors, tmp_path / "adapter", modules_to_save=["norm"])
    _, report = transfer_weights(adapter, source, saved(weights(2, seed=2), tmp_path / "other"))
    assert list(report.dropped.values()) == ["no update of a matrix"]


@pytest.mark.parametrize("maps", ["bases", "none"])
def test_the_same_bytes_every_time(adapter: Adapter, source: BaseWeights, tmp_path: Path, maps: Any) -> None:
    other = saved(weights(2, seed=6), tmp_path / "other")
    for name in ("a", "b"):
        save(transfer_weights(adapter, source, other, maps=maps)[0], tmp_path / name)
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


def test_singular_vectors_are_kept_between_runs(
    adapter: Adapter, source: BaseWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = saved(weights(2, seed=6), tmp_path / "other")
    search = Search(cache=Cache(tmp_path / "cache"))
    first = transfer_weights(adapter, source, other, search=search)[0]
    monkeypatch.setattr("loratools.ops.base_spectra.decomposed", lambda matrix: pytest.fail("decomposed again"))
    second = transfer_weights(adapter, source, other, search=search)[0]
    for target in first:
        torch.testing.assert_close(dense(first, target), dense(second, target), atol=1e-12, rtol=0)


class Products(TorchDispatchMode):
    """Remembers how large products were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(word in str(func) for word in (".mm", ".bmm", ".addmm", ".matmul", ".einsum", ".outer")):
            self.sizes.append(out.numel())
        return out


def test_factors_never_become_a_matrix(tmp_path: Path) -> None:
    leaves = {"self_attn.q_proj": (300, 280)}
    adapter = adapted(factors(2, rank=2, leaves=leaves), tmp_path / "adapter", rank=2)
    source, other = saved(weights(2, leaves), tmp_path / "one"), saved(weights(3, leaves, seed=1), tmp_path / "other")
    with Products() as seen:
        transfer_weights(adapter, source, other)
    assert seen.sizes
    # singular vectors of the bases side by side are 70 x 70 at most, factors 300 x 4
    assert max(seen.sizes) <= 70 * 70


def test_hostile_inputs(adapter: Adapter, source: BaseWeights, tmp_path: Path) -> None:
    broken = weights(2)
    broken["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    with pytest.raises(AdapterError, match=r"^model\.layers\.1\.mlp\.up_proj: .*NaN or infinity"):
        transfer_weights(adapter, source, saved(broken, tmp_path / "broken"))
    tensors = factors(2)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"][0, 0] = float("inf")
    bad = adapted(tensors, tmp_path / "bad")
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.mlp\.up_proj"):
        transfer_weights(bad, source, saved(weights(2, seed=2), tmp_path / "fine"))
    whole = {k: t.to(torch.int8) if t.ndim == 2 else t for k, t in weights(2).items()}
    with pytest.raises(AdapterError, match=r"is held as torch\.int8"):
        transfer_weights(adapter, source, saved(whole, tmp_path / "int8"))
    wrong = saved({k: t[:, :-1].clone() if t.ndim == 2 else t for k, t in weights(2).items()}, tmp_path / "wrong")
    with pytest.raises(UnchangedError, match="do not fit the weight of its own base"):
        transfer_weights(adapter, wrong, source)
    vectors = saved({k: t[0].clone() if t.ndim == 2 else t for k, t in weights(2).items()}, tmp_path / "vectors")
    with pytest.raises(UnchangedError, match="is no matrix"):
        transfer_weights(adapter, source, vectors)
    pissa = adapted(factors(2), tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(MutatedBaseError):
        transfer_weights(pissa, source, source)


def test_zeros_stay_zeros(source: BaseWeights, tmp_path: Path) -> None:
    tensors = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in factors(2).items()}
    found, report = transfer_weights(
        adapted(tensors, tmp_path / "zero"), source, saved(weights(2, seed=2), tmp_path / "other")
    )
    assert all(float(dense(found, t).norm()) == 0 for t in found)
    assert all(row.kept == 1 for row in report.targets.values())


def test_pairs_and_depths_are_read_off_names(adapter: Adapter, source: BaseWeights, tmp_path: Path) -> None:
    bare = saved({k.removeprefix("model."): t for k, t in weights(4).items()}, tmp_path / "bare")
    assert depth(bare, "model.layers.") == 4
    assert depth(bare, "model.blocks.") == 0
    found, dropped = pairings(adapter, source, bare)
    assert not dropped
    assert len(found) == 12
    assert all(sum(o.share for o in p.origins) == pytest.approx(1.0) for p in found)
