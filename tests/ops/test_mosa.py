"""Sparse experts: masks are disjoint, what they began with is found again, and merged by each rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools import assemble, merge_experts
from loratools.errors import AdapterError, UnsupportedInTargetError, UsageError
from loratools.ops.convert import Convert
from loratools.ops.mosa import merged, recovered, split

LAYER = "enc.transformer.encoder.layer.0"


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(shape: tuple[int, ...], count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(start, masks, experts) after training: each expert changes the entries of its mask, and no others."""
    start, masks = rand(seed, *shape), split(shape, count, seed=seed)
    return start, masks, torch.where(masks, start + rand(seed + 1, count, *shape), start)


@pytest.mark.parametrize("shape", [(7, 5), (64, 16), (1,), (3, 3)])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_masks_are_disjoint_and_cover_everything(shape: tuple[int, ...], count: int) -> None:
    masks = split(shape, count, seed=3)
    assert masks.shape == (count, *shape)
    assert torch.equal(masks.sum(0), torch.ones(shape, dtype=torch.int64))
    sizes = masks.reshape(count, -1).sum(1).tolist()
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(masks, split(shape, count, seed=3))
    if count > 1 and masks[0].numel() > 10:
        assert not torch.equal(masks, split(shape, count, seed=4))
    with pytest.raises(UsageError, match="0 experts"):
        split(shape, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [3, 4, 9])
def test_the_beginning_is_found_again_to_the_bit(count: int, dtype: torch.dtype) -> None:
    start, masks, experts = trained((12, 10), count, 0)
    start, experts = start.to(dtype), experts.to(dtype)
    experts = torch.where(masks, experts, start)
    found, changes = recovered(experts)
    assert torch.equal(found, start)
    np.testing.assert_array_equal(changes.numpy(), experts.double().numpy() - start.double().numpy())
    assert torch.equal(changes != 0, masks & (experts != start))


@pytest.mark.parametrize("count", [3, 5])
def test_the_rules_are_their_formulas(count: int) -> None:
    start, masks, experts = trained((8, 6), count, 5)
    w0, parts = start.double().numpy(), [e.double().numpy() - start.double().numpy() for e in experts]
    wanted = {
        "mean": w0 + sum(parts) / count,
        "joint": (w0 + sum(parts)) / count,
        "sum": w0 + sum(parts),
    }
    for rule, truth in wanted.items():
        np.testing.assert_allclose(merged(experts, rule).numpy(), truth, rtol=1e-12, atol=1e-14)  # type: ignore[arg-type]
    code = torch.zeros(8, 6, dtype=torch.float64)  # as the authors merge: entry by entry of each mask, then divided
    for mask, expert in zip(masks, experts, strict=True):
        code[mask] = expert.double()[mask]
    np.testing.assert_allclose(merged(experts, "joint").numpy(), code.numpy() / count, rtol=1e-12)
    np.testing.assert_allclose(merged(experts, "sum").numpy(), code.numpy(), rtol=1e-12)


def test_what_experts_do_not_tell() -> None:
    _, _, experts = trained((6, 4), 3, 0)
    with pytest.raises(AdapterError, match="2 experts do not tell"):
        merged(experts[:2], "sum")
    torch.testing.assert_close(merged(experts[:2], "mean"), experts[:2].double().mean(0))
    with pytest.raises(AdapterError, match="not disjoint"):
        merged(experts + rand(9, 3, 6, 4), "joint")
    with pytest.raises(UsageError, match="no rule"):
        merged(experts, "median")  # type: ignore[arg-type]


def mosl(
    folder: Path, *, count: int = 4, parts: str = "qv", stale: bool = False, share: str = ""
) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint as the code would save it, merged by `mean`, and the deltas of W0 + sum of changes."""
    tensors, whole = {f"{LAYER}.attn.query.weight": rand(99, 8, 8), "head.weight": rand(98, 3, 8)}, {}
    names = {"q": "query", "k": "key", "v": "value", "o": "out"}
    for i, part in enumerate(parts):
        sides = {}
        for side, shape in (("A", (2, 8)), ("B", (8, 2))):
            stem = f"{LAYER}.attn.lora_{side}_{part}"
            if share == side:
                tensors[f"{stem}.weight"] = sides[side] = rand(7 * i, *shape)
                continue
            start, masks, experts = trained(shape, count, 10 * i + ord(side))
            tensors |= {f"{stem}.{k}.weight": e.clone() for k, e in enumerate(experts)}
            tensors[f"{stem}_merge.weight"] = rand(1, *shape) if stale else experts.double().mean(0).float()
            sides[side] = torch.where(masks, experts, start).sum(0) - (count - 1) * start
        whole[f"{LAYER}.attn.{names[part]}"] = sides["B"].double() @ sides["A"].double()
    save_file(tensors, folder / "mosl.safetensors")
    return folder / "mosl.safetensors", whole


def test_a_checkpoint_is_read_as_it_was_merged(tmp_path: Path) -> None:
    path, _ = mosl(tmp_path)
    adapter = loratools.load(path)
    assert adapter.format.name == "mosa"
    assert set(adapter) == {f"{LAYER}.attn.query", f"{LAYER}.attn.value"}
    tensors = load_file(path)
    for part, name in (("q", "query"), ("v", "value")):
        up, down = (tensors[f"{LAYER}.attn.lora_{side}_{part}_merge.weight"].double() for side in "BA")
        torch.testing.assert_close(adapter[f"{LAYER}.attn.{name}"].delta(), (up @ down).float())
    assert any("SCALAR" in warning for warning in adapter.warnings)
    scaled = loratools.load(path, alpha=0.5)
    torch.testing.assert_close(scaled[f"{LAYER}.attn.query"].delta(), adapter[f"{LAYER}.attn.query"].delta() / 2)
    assert not scaled.warnings


@pytest.mark.parametrize("share", ["", "A", "B"])
def test_assembled_by_each_rule(tmp_path: Path, share: str) -> None:
    path, whole = mosl(tmp_path, share=share)
    adapter = loratools.load(path, alpha=0.5)
    stored, mean, joint, together = (assemble(adapter, rule) for rule in ("stored", "mean", "joint", "sum"))
    sides = 1 if share else 2
    for target, delta in whole.items():
        wanted = 0.5 * delta
        torch.testing.assert_close(together[target].delta(), wanted.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(joint[target].delta(), (wanted / 4**sides).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean[target].delta(), adapter[target].delta(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stored[target].delta(), adapter[target].delta(), rtol=0, atol=0)
    assert assemble(adapter, "sum", scale=2.0).entries[f"{LAYER}.attn.query"].scale == 2.0
    result, _ = loratools.convert(together, "peft")
    saved = loratools.convert_file(together, tmp_path / "peft", "peft")[0]
    assert set(loratools.load(saved.path)) == set(result)
    for (_, one), two in zip(sorted(loratools.load(saved.path).items()), sorted(whole), strict=True):
        torch.testing.assert_close(one.delta(), (0.5 * whole[two]).float(), rtol=1e-4, atol=1e-5)


def test_stale_merges_are_not_taken(tmp_path: Path) -> None:
    adapter = loratools.load(mosl(tmp_path, stale=True)[0])
    with pytest.raises(AdapterError, match=r"lora_A_q\.weight: the merged tensor in the file is not of these experts"):
        assemble(adapter)
    assert assemble(adapter, "sum")


def test_the_branch_of_the_output_is_no_update(tmp_path: Path) -> None:
    adapter = loratools.load(mosl(tmp_path, parts="qo")[0])
    assert set(adapter) == {f"{LAYER}.attn.query"}
    assert all("lora_" in key and "_o" in key for key in adapter.unsupported)
    assert "reads the layer's input" in next(iter(adapter.unsupported.values()))
    made = assemble(adapter, "sum")
    with pytest.raises(UnsupportedInTargetError, match="--drop unsupported"):
        loratools.convert(made, "peft")
    assert set(loratools.convert(made, "peft", Convert(drop=frozenset({"unsupported"})))[0])


def test_experts_that_were_never_merged(tmp_path: Path) -> None:
    path, whole = mosl(tmp_path)
    bare = {key: t for key, t in load_file(path).items() if "_merge" not in key}
    save_file(bare, tmp_path / "bare.safetensors")
    adapter = loratools.load(tmp_path / "bare.safetensors")
    assert not adapter.entries
    assert all("loratools.assemble" in why for why in adapter.unsupported.values())
    with pytest.raises(AdapterError, match="say by which rule"):
        assemble(adapter)
    torch.testing.assert_close(
        assemble(adapter, "sum")[f"{LAYER}.attn.query"].delta(),
        whole[f"{LAYER}.attn.query"].float(),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("biases", ["masked", "whole"])
def test_bottlenecks_are_merged_too(tmp_path: Path, biases: str) -> None:
    start, masks, experts = trained((3, 8), 4, 0)
    own = trained((3,), 4, 1)[2] if biases == "masked" else rand(2, 4, 3)
    tensors = {f"{LAYER}.adapter_down.{k}.weight": e.clone() for k, e in enumerate(experts)}
    tensors |= {f"{LAYER}.adapter_down.{k}.bias": e.clone() for k, e in enumerate(own)}
    tensors[f"{LAYER}.adapter_down_merge.weight"] = experts.mean(0)
    tensors["head.weight"] = rand(3, 2, 8)
    tensors["neck.0.weight"] = rand(4, 2, 8)  # of no expert
    save_file(tensors, tmp_path / "mosa.safetensors")
    with pytest.raises(AdapterError):
        assemble(loratools.load(tmp_path / "mosa.safetensors"))
    made = merge_experts(tensors, "sum")
    assert set(made) == {f"{LAYER}.adapter_down.weight", f"{LAYER}.adapter_down.bias", "head.weight", "neck.0.weight"}
    wanted = torch.where(masks, experts, torch.zeros(())).sum(0)
    torch.testing.assert_close(made[f"{LAYER}.adapter_down.weight"], wanted)
    assert not torch.equal(wanted, start)
    bias = made[f"{LAYER}.adapter_down.bias"]
    torch.testing.assert_close(bias, own.mean(0) if biases == "whole" else merged(own, "sum").float())
    assert merge_experts(tensors, "mean")[f"{LAYER}.adapter_down.weight"].dtype == torch.float32


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    experts = {f"a.adapter_up.{k}.weight": rand(k, 2, 2) for k in (0, 1, 3)}
    with pytest.raises(AdapterError, match=r"a\.adapter_up\.weight: of its experts only 0, 1, 3 are there"):
        merge_experts(experts, "mean")
    with pytest.raises(UsageError, match="'median' is no rule"):
        merge_experts(experts, "median")  # type: ignore[arg-type]
    save_file({"a.lora_A": rand(0, 2, 4), "a.lora_B": rand(1, 4, 2)}, tmp_path / "bare.safetensors")
    with pytest.raises(AdapterError, match="loralib has no experts"):
        assemble(loratools.load(tmp_path / "bare.safetensors"))


def test_the_state_of_s2ft_says_where_its_places_are(tmp_path: Path) -> None:
    torch.save({"model.layers.0.mlp.down_proj.s2": rand(0, 6, 3)}, tmp_path / "s2.bin")
    adapter = loratools.load(tmp_path / "s2.bin")
    assert not adapter.entries
    assert "loratools extract" in adapter.unsupported["model.layers.0.mlp.down_proj.s2"]
