"""Conversions: there and back is the identity, and on the way every module gets the delta that it had."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.adapter import Adapter
from loratools.errors import AdapterError, UnmappedModuleError, UnsupportedInTargetError, UsageError
from loratools.files import load
from loratools.formats import FORMATS, writable_formats
from loratools.formats.modules import Module
from loratools.ops.convert import Convert, convert, convert_file
from loratools.ops.lowering import Lowering

Samples = Callable[[str], Path]

# Sample -> the dialects that hold all of it, and the options that the way there needs.
LOSSLESS: dict[str, tuple[str, ...]] = {
    "peft/lora_plain": ("kohya",),
    "peft/lora_f16": ("kohya",),
    "peft/old_bin": ("kohya",),
    "peft/rslora": ("kohya",),
    "peft/rank_alpha_pattern": ("kohya",),
    "peft/lora_all_linear": ("kohya",),
    "peft/exclude_modules": ("kohya",),
    "peft/lora_conv2d": ("kohya",),
    "peft/dora": ("kohya",),
    "kohya/flux_bfl": ("peft", "diffusers", "comfy"),
    "kohya/sd15_unet_te": ("diffusers", "comfy"),
    "kohya/sd15_linear_only": ("peft", "diffusers", "comfy"),
    "kohya/sd15_pt_pickle": ("peft", "diffusers", "comfy"),
    "diffusers/flux_lora": ("peft", "kohya", "comfy"),
    "diffusers/sd_unet_te": ("kohya", "comfy"),
    "diffusers/sd_unet_te_nometa": ("kohya", "comfy"),
    "diffusers/sd_conv": ("peft", "kohya", "comfy"),
    "diffusers/sd_bin": ("kohya", "comfy"),
    "diffusers/sd3_tiny": ("peft", "kohya", "comfy"),
    "diffusers/qwen_image_tiny": ("peft", "kohya", "comfy"),
    "diffusers/sd_to_kohya": ("diffusers", "comfy"),
}
PAIRS = [(name, to) for name, dialects in LOSSLESS.items() for to in dialects]
each_pair = pytest.mark.parametrize(("name", "to"), PAIRS, ids=[f"{n}-{t}" for n, t in PAIRS])
PLAIN = Convert()
HASHES = {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}


def opened(samples: Samples, name: str) -> Adapter:
    folder = samples(name)
    if (folder / "adapter_config.json").exists():
        return load(folder)
    (weights,) = (p for p in folder.iterdir() if p.stem in ("lora", "adapter") or p.stem.startswith("pytorch_lora"))
    return load(weights)


def written(adapter: Adapter, folder: Path, to: str, options: Convert = PLAIN) -> Adapter:
    place = folder / f"{to}-{len(list(folder.iterdir()))}"
    saved, _ = convert_file(adapter, place if to == "peft" else place.with_suffix(".safetensors"), to, options)
    return load(saved.path)


def by_module(adapter: Adapter) -> dict[Module, np.ndarray]:
    """The delta of every module, cut from the file's deltas by the rows that the placement names."""
    found = {}
    for target, update in adapter.items():
        placement = adapter.format.place(target)
        assert placement is not None
        delta = update.delta().double().numpy()
        for piece in placement.pieces:
            found[piece.module] = delta[piece.rows.indices(delta.shape[0]).numpy()]
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@each_pair
def test_there_and_back_is_the_identity(samples: Samples, tmp_path: Path, name: str, to: str) -> None:
    before = opened(samples, name)
    after = written(written(before, tmp_path, to), tmp_path, before.format.name)
    assert set(after) == set(before)
    for target, update in before.items():
        again = after[target]
        assert again.scale == update.scale
        assert set(again.parameters()) == set(update.parameters())
        assert all(same_bits(again.parameters()[slot], t) for slot, t in update.parameters().items()), target
    assert after.config == before.config
    gone = {k for k in before.metadata if k not in after.metadata}
    assert gone <= HASHES
    assert all(after.metadata[k] == before.metadata[k] for k in set(before.metadata) - gone)


@each_pair
def test_every_module_keeps_its_delta(samples: Samples, tmp_path: Path, name: str, to: str) -> None:
    before = opened(samples, name)
    if any(entry.family.needs_base for entry in before.entries.values()):
        pytest.skip("the delta of DoRA needs the base; its tensors are compared by the identity above")
    after = written(before, tmp_path, to)
    assert after.format.name == to
    wanted, found = by_module(before), by_module(after)
    for module, delta in wanted.items():
        assert np.linalg.norm(found[module].reshape(delta.shape) - delta) <= 1e-6 * np.linalg.norm(delta), module
    assert all(not found[module].any() for module in set(found) - set(wanted))  # parts that nothing changes


@each_pair
def test_every_key_is_accounted_for(samples: Samples, name: str, to: str) -> None:
    before = opened(samples, name)
    _, report = convert(before, to)
    keys = report.keys
    shared = sum(len(e.specs) for e in before.entries.values())
    assert keys == {"updates": shared, "scales": keys["scales"], "carried": 0, "dropped": 0}
    assert {s for t in report.targets.values() for s in t.sources} == set(before)
    assert report.to_dict()["format"] == to


def save_kohya(path: Path, modules: dict[str, tuple[Tensor, Tensor, float | None]], **metadata: str) -> Adapter:
    tensors = {}
    for name, (down, up, alpha) in modules.items():
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down.clone(), up
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return load(path)


class TestFused:
    """FLUX: qkv in one module for its authors, in three for diffusers."""

    QKV = "lora_unet_double_blocks_0_img_attn_qkv"

    def test_parts_share_the_down_factor(self, tmp_path: Path) -> None:
        down, up = torch.randn(4, 6), torch.randn(9, 4)
        single = "lora_unet_single_blocks_0_linear2"
        adapter = save_kohya(
            tmp_path / "in.safetensors", {self.QKV: (down, up, 2.0), single: (down, torch.randn(6, 4), 2.0)}
        )
        result, _ = convert(adapter, "diffusers")
        for i, part in enumerate(("to_q", "to_k", "to_v")):
            update = result[f"transformer.transformer_blocks.0.attn.{part}"]
            assert torch.equal(update.parameters()["down"], down)
            assert torch.equal(update.parameters()["up"], up[3 * i : 3 * i + 3])
            assert update.scale == 0.5

    def test_a_block_diagonal_up_splits_its_ranks(self, tmp_path: Path) -> None:
        """As sd-scripts joins three adapters of rank 2; the scale of the parts stays alpha over all the rows."""
        down = torch.randn(6, 5)
        ups = [torch.randn(3, 2) for _ in range(3)]
        single = "lora_unet_single_blocks_0_linear2"
        adapter = save_kohya(
            tmp_path / "in.safetensors",
            {self.QKV: (down, torch.block_diag(*ups), 3.0), single: (down, torch.randn(6, 6), 3.0)},
        )
        result, _ = convert(adapter, "diffusers")
        for i, part in enumerate(("to_q", "to_k", "to_v")):
            name = f"transformer.transformer_blocks.0.attn.{part}"
            assert result.entries[name].rank == 2
            assert torch.equal(result[name].parameters()["up"], ups[i])
            assert torch.equal(result[name].parameters()["down"], down[2 * i : 2 * i + 2])
            assert result[name].scale == 0.5

    def test_parts_of_their_own_join_side_by_side(self, tmp_path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        deltas = []
        for i, part in enumerate(("to_q", "to_v")):
            a, b = torch.randn(2 + i, 5), torch.randn(4, 2 + i)
            stem = f"transformer.single_transformer_blocks.3.attn.{part}"
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            deltas.append(b.double() @ a.double())
        save_file(tensors, tmp_path / "in.safetensors")
        result, report = convert(load(tmp_path / "in.safetensors"), "kohya")
        (name,) = result
        assert name == "lora_unet_single_blocks_3_linear1"
        wanted = torch.zeros(28, 5, dtype=torch.float64)  # q, k, v of four rows, and an MLP of sixteen
        wanted[:4], wanted[8:12] = deltas
        torch.testing.assert_close(result[name].delta().double(), wanted, rtol=1e-6, atol=1e-6)
        assert result.entries[name].rank == 5
        assert report.targets[name].actions == ("2 parts joined side by side, 2 parts zero",)

    def test_parts_of_different_scales(self, tmp_path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        deltas = []
        for i, part in enumerate(("to_q", "to_k", "to_v")):
            a, b = torch.randn(2, 5), torch.randn(4, 2)
            stem = f"transformer.transformer_blocks.0.attn.{part}"
            tensors |= {
                f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.alpha": torch.tensor(1.0 + i),
            }  # fmt: skip
            deltas.append((1.0 + i) / 2 * (b.double() @ a.double()))
        save_file(tensors, tmp_path / "in.safetensors")
        result, _ = convert(load(tmp_path / "in.safetensors"), "kohya", Convert(model="flux"))
        (delta,) = (u.delta().double() for u in result.values())
        torch.testing.assert_close(delta, torch.cat(deltas), rtol=1e-6, atol=1e-6)


class TestScales:
    def test_alpha_is_kept_bit_for_bit(self, samples: Samples, tmp_path: Path) -> None:
        before = opened(samples, "kohya/sd15_unet_te")
        after = written(before, tmp_path, "comfy")
        tensors = load_file(after.origin.path)  # type: ignore[union-attr]
        for target, entry in before.entries.items():
            placement = before.format.place(target)
            assert placement is not None
            name = next(t for t in after if (p := after.format.place(t)) and p.pieces == placement.pieces)
            assert float(tensors[f"{name}.alpha"]) == pytest.approx(entry.scale * entry.rank, rel=1e-7)

    def test_rslora_becomes_an_alpha_that_says_the_same(self, samples: Samples, tmp_path: Path) -> None:
        adapter = opened(samples, "peft/rslora")
        after = written(adapter, tmp_path, "kohya")
        config = adapter.config
        assert config is not None
        for entry in after.entries.values():
            assert entry.scale == pytest.approx(config["lora_alpha"] / math.sqrt(config["r"]), rel=1e-7)

    def test_without_metadata_the_scale_is_folded(self, samples: Samples, tmp_path: Path) -> None:
        before = opened(samples, "kohya/sd15_linear_only")
        after = written(before, tmp_path, "diffusers", Convert(metadata=False))
        assert after.metadata == {}
        assert {e.scale for e in after.entries.values()} == {1.0}
        wanted, found = by_module(before), by_module(after)
        assert all(np.linalg.norm(found[m] - d) < 1e-6 * np.linalg.norm(d) for m, d in wanted.items())
        _, report = convert(before, "diffusers", Convert(metadata=False))
        assert "W_SCALE_FOLDED" in report.notices

    def test_fold_alpha(self, samples: Samples, tmp_path: Path) -> None:
        after = written(opened(samples, "peft/rslora"), tmp_path, "kohya", Convert(fold_alpha=True))
        assert {e.scale for e in after.entries.values()} == {1.0}

    def test_portable(self, samples: Samples, tmp_path: Path) -> None:
        before = opened(samples, "peft/rank_alpha_pattern")
        after = written(before, tmp_path, "peft", Convert(portable=True))
        config = after.config
        assert config is not None
        highest = max(e.rank for e in before.entries.values())
        assert {e.rank for e in after.entries.values()} == {highest}
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (highest, highest, False)
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
        for target, update in before.items():
            torch.testing.assert_close(after[target].delta(), update.delta(), rtol=1e-5, atol=1e-7)


class TestFamilies:
    def test_loha_stays_loha_where_it_can(self, tmp_path: Path) -> None:
        shapes = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}
        module = "lora_unet_double_blocks_0_img_mod_lin"
        tensors = {f"{module}.{slot}": torch.randn(*shape) for slot, shape in shapes.items()}
        save_file(tensors | {f"{module}.alpha": torch.tensor(1.0)}, tmp_path / "loha.safetensors")
        adapter = load(tmp_path / "loha.safetensors")
        result, report = convert(adapter, "comfy")
        (target,) = result
        assert target == "diffusion_model.double_blocks.0.img_mod.lin"
        assert report.targets[target].family == "loha"
        assert torch.equal(result[target].delta(), next(iter(adapter.values())).delta())

    def test_other_families_need_leave(self, samples: Samples) -> None:
        adapter = opened(samples, "peft/loha")
        with pytest.raises(UnsupportedInTargetError, match="mlx has no place for loha; pass --exact"):
            convert(adapter, "mlx")

    def test_approximation_states_its_error(self, samples: Samples, tmp_path: Path) -> None:
        adapter = opened(samples, "lycoris/loha")
        options = Convert(Lowering(rank=3))
        after = written(adapter, tmp_path, "peft", options)
        _, report = convert(adapter, "peft", options)
        for (target, row), update in zip(report.targets.items(), adapter.values(), strict=True):
            delta = update.delta().double().flatten(1)
            found = after[target].delta().double().flatten(1)
            error = float((delta - found).norm() / delta.norm())
            values = torch.linalg.svdvals(delta)
            assert row.relative_error == pytest.approx(error, rel=1e-4)
            assert error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-4)

    def test_energy(self, samples: Samples) -> None:
        _, report = convert(opened(samples, "lycoris/loha"), "peft", Convert(Lowering(energy=0.9)))
        assert all(t.relative_error is not None and t.relative_error**2 <= 0.1 for t in report.targets.values())

    def test_exactly(self, tmp_path: Path) -> None:
        shapes = {"hada_w1_a": (40, 2), "hada_w1_b": (2, 50), "hada_w2_a": (40, 3), "hada_w2_b": (3, 50)}
        save_file({f"lycoris_lin.{s}": torch.randn(*shape) for s, shape in shapes.items()}, tmp_path / "x.safetensors")
        adapter = load(tmp_path / "x.safetensors")
        result, report = convert(adapter, "peft", Convert(Lowering(exact=True)))
        assert result.entries["lin"].rank == 6
        assert report.targets["lin"].relative_error is None
        torch.testing.assert_close(result["lin"].delta(), adapter["lycoris_lin"].delta(), rtol=1e-5, atol=1e-5)

    def test_a_tucker_core_is_multiplied_in(self, samples: Samples, tmp_path: Path) -> None:
        before = opened(samples, "lycoris/locon_tucker")
        after = written(before, tmp_path, "peft")
        for target, update in before.items():
            placement = before.format.place(target)
            assert placement is not None
            found = after[placement.pieces[0].module.path].delta()
            torch.testing.assert_close(found, update.delta(), rtol=1e-5, atol=1e-6)
        assert "mid" not in {slot for e in after.entries.values() for slot in e.specs}

    def test_a_magnitude_takes_the_shape_of_the_dialect(self, samples: Samples, tmp_path: Path) -> None:
        kohya = written(opened(samples, "peft/dora"), tmp_path, "kohya")
        for entry in kohya.entries.values():
            assert entry.specs["magnitude"].shape == (entry.specs["up"].shape[0], 1)


class TestRefusals:
    def test_unknown_dialect(self, samples: Samples) -> None:
        with pytest.raises(UsageError, match="cannot write 'loralib'; the dialects that can be written are peft"):
            convert(opened(samples, "peft/lora_plain"), "loralib")

    @pytest.mark.parametrize("to", ["diffusers", "comfy"])
    def test_a_language_model_in_an_image_dialect(self, samples: Samples, to: str) -> None:
        with pytest.raises(UnmappedModuleError, match=r"model\.layers\.0"):
            convert(opened(samples, "peft/lora_plain"), to)

    @pytest.mark.parametrize(
        ("name", "what"),
        [("peft/lora_embedding", "an embedding"), ("peft/moe_target_parameters", "a stack of experts")],
    )
    def test_layouts_without_a_place(self, samples: Samples, name: str, what: str) -> None:
        with pytest.raises(UnsupportedInTargetError, match=f"kohya has no place for an update of {what}"):
            convert(opened(samples, name), "kohya")

    def test_a_bias_may_be_dropped(self, samples: Samples, tmp_path: Path) -> None:
        adapter = opened(samples, "peft/lora_bias_true")
        with pytest.raises(UnsupportedInTargetError, match="--drop bias"):
            convert(adapter, "kohya")
        result, report = convert(adapter, "kohya", Convert(drop=frozenset({"bias"})))
        assert all("up_bias" not in e.specs for e in result.entries.values())
        assert set(report.dropped) == set(result)

    def test_whole_modules_may_be_dropped(self, samples: Samples) -> None:
        adapter = opened(samples, "peft/modules_to_save")
        with pytest.raises(UnsupportedInTargetError, match="--drop extras"):
            convert(adapter, "kohya")
        _, report = convert(adapter, "kohya", Convert(drop=frozenset({"extras"})))
        assert set(report.dropped) == set(adapter.extras)

    def test_several_models_in_one_peft_adapter(self, samples: Samples, tmp_path: Path) -> None:
        adapter = opened(samples, "kohya/sd15_unet_te")
        with pytest.raises(UnmappedModuleError, match="choose one with --component"):
            convert(adapter, "peft")
        result, report = convert(adapter, "peft", Convert(component="unet"))
        assert all(t.startswith(("down_blocks", "up_blocks", "mid_block", "conv", "time")) for t in result)
        assert len(result) + len(report.dropped) == len(adapter)

    def test_names_that_no_model_has(self, tmp_path: Path) -> None:
        tensors = {"te_odd.lora_down.weight": torch.randn(2, 4), "te_odd.lora_up.weight": torch.randn(3, 2)}
        lone = {k.replace("te_odd", "lycoris_q"): t.clone() for k, t in tensors.items()}
        save_file(tensors | lone, tmp_path / "x.safetensors")
        adapter = load(tmp_path / "x.safetensors")
        with pytest.raises(UnmappedModuleError, match="te_odd; pass --drop unmapped"):
            convert(adapter, "peft")
        result, report = convert(adapter, "peft", Convert(drop=frozenset({"unmapped"})))
        assert list(result) == ["q"]
        assert list(report.dropped) == ["te_odd"]

    def test_two_names_of_one_module(self, tmp_path: Path) -> None:
        tensors = {}
        for name in ("lora_unet_middle_block_1_proj_in", "lora_unet_mid_block_attentions_0_proj_in"):
            tensors |= {f"{name}.lora_down.weight": torch.randn(2, 4), f"{name}.lora_up.weight": torch.randn(4, 2)}
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(AdapterError, match=r"both change unet\.mid_block\.attentions\.0\.proj_in"):
            convert(load(tmp_path / "x.safetensors"), "diffusers")


def test_the_base_tells_names_that_flattening_lost(samples: Samples) -> None:
    from loratools.base_weights import load_base

    adapter = opened(samples, "lycoris/locon")
    base = load_base(samples("lycoris/locon") / "base.safetensors")
    assert "blk.fc_out" in convert(adapter, "peft", Convert(base=base))[0]
    assert "blk.fc.out" in convert(adapter, "peft")[0]


def test_what_is_carried_survives_a_third_dialect(samples: Samples, tmp_path: Path) -> None:
    before = opened(samples, "diffusers/flux_lora")
    after = written(written(written(before, tmp_path, "kohya"), tmp_path, "comfy"), tmp_path, "diffusers")
    assert json.loads(after.metadata["lora_adapter_metadata"]) == json.loads(before.metadata["lora_adapter_metadata"])
    for target, update in before.items():
        assert all(same_bits(after[target].parameters()[s], t) for s, t in update.parameters().items())


def test_hostile_carried_metadata_is_ignored(samples: Samples, tmp_path: Path) -> None:
    adapter = opened(samples, "kohya/sd15_linear_only")
    for text in ("[1]", "{", '{"format": 3}', '{"format": "diffusers", "names": [1]}', "9" * 5000, "[" * 100_000):
        odd = replace(adapter, metadata={**adapter.metadata, "loratools_source": text})
        result, _ = convert(odd, "diffusers")
        assert len(result) == len(adapter)


def test_same_input_same_bytes(samples: Samples, tmp_path: Path) -> None:
    adapter = opened(samples, "kohya/flux_bfl")
    for name in ("a", "b"):
        convert_file(adapter, tmp_path / f"{name}.safetensors", "diffusers")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_record_says_what_was_done(samples: Samples, tmp_path: Path) -> None:
    after = written(opened(samples, "kohya/flux_bfl"), tmp_path, "diffusers", Convert(fold_alpha=True))
    with safe_open(after.origin.path, "pt") as file:  # type: ignore[union-attr]
        record = json.loads(file.metadata()["loratools"])
    assert record["verb"] == "convert"
    assert record["arguments"] == {"to": "diffusers", "fold_alpha": True}


def test_writable_dialects_are_formats() -> None:
    assert set(writable_formats()) <= {f.name for f in FORMATS}
    assert {"peft", "kohya", "diffusers", "comfy"} <= set(writable_formats())


class TestLycoris:
    @pytest.mark.parametrize("name", ["boft", "glora", "loha_dora", "lokr_dora", "lokr_full_matrix", "oft_constraint"])
    def test_families_keep_their_tensors_and_numbers(self, samples: Samples, tmp_path: Path, name: str) -> None:
        """Scales, and an alpha that is no scale: the constraint of an OFT."""
        before = load(samples(f"lycoris/{name}") / "adapter.safetensors")
        convert_file(before, tmp_path / "there", "comfy", Convert(component="unet"))
        after = load(tmp_path / "there.safetensors")

        def numbers(adapter: Adapter) -> list[tuple[int, float, float | None]]:
            return sorted((e.rank, e.scale, None if e.rank else e.alpha) for e in adapter.entries.values())

        def tensors(adapter: Adapter) -> set[tuple[str, bytes]]:
            return {(slot, t.numpy().tobytes()) for u in adapter.values() for slot, t in u.parameters().items()}

        assert numbers(after) == numbers(before)
        assert tensors(after) == tensors(before)

    def test_norms_and_their_biases_keep_their_suffixes(self, samples: Samples, tmp_path: Path) -> None:
        adapter = load(samples("lycoris/locon_norm") / "adapter.safetensors")
        options = Convert(component="unet")
        convert_file(adapter, tmp_path / "there", "comfy", options)
        there = load_file(tmp_path / "there.safetensors")
        assert {key for key in there if ".lora_" not in key and ".alpha" not in key} == {
            "diffusion_model.norm.w_norm",
            "diffusion_model.gn.w_norm",
            "diffusion_model.norm.b_norm",
            "diffusion_model.gn.b_norm",
        }
        with pytest.raises(UnsupportedInTargetError, match="--drop bias"):
            convert(adapter, "peft", options)
        options = replace(options, drop=frozenset({"bias"}))
        with pytest.raises(UnsupportedInTargetError, match="a change of a norm"):
            convert(adapter, "peft", replace(options, lowering=Lowering(rank=1)))


def test_a_model_that_names_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    pair = {f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(8, 2)}
    save_file(pair, tmp_path / "a.safetensors")
    adapter = load(tmp_path / "a.safetensors")
    result, report = convert(adapter, "kohya")
    assert "--model" in report.notices["W_MODEL_UNKNOWN"]
    assert list(result) == ["lora_unet_transformer_blocks_0_attn_to_q"]
    assert "W_MODEL_UNKNOWN" not in convert(adapter, "kohya", Convert(model="sd3"))[1].notices


def test_what_is_no_longer_as_it_was_is_said(samples: Samples) -> None:
    adapter = opened(samples, "kohya/flux_bfl")
    plain = convert(adapter, "diffusers")[1].notices
    assert set(plain) == {"I_SPLIT_FUSED"}
    options = Convert(dtype="bf16", metadata=False)
    told = convert(adapter, "diffusers", options)[1].notices
    assert told["W_DTYPE_CAST"] == "F32 was rounded to bf16"
    assert all(key in told["W_METADATA_DROPPED"] for key in adapter.metadata)
    assert "I_SPLIT_FUSED" not in convert(adapter, "comfy")[1].notices
    assert "W_DTYPE_CAST" not in convert(adapter, "comfy", Convert(dtype="f32"))[1].notices
