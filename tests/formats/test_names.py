"""Module names: every module of the full-size models, as sd-scripts flattens it and as diffusers has it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from loratools.formats import kohya_names
from loratools.formats.layouts import flux, from_native, model_of, native_placements, sd3, sdxl, to_native, wan
from loratools.formats.layouts.flat import flatten, unflatten
from loratools.formats.lora_config import target_modules
from loratools.formats.modules import Module, Rows

LISTS = Path(__file__).resolve().parents[1] / "fixtures" / "keylists"


def listed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress((LISTS / f"{name}.json.gz").read_bytes()))
    return found


@pytest.mark.parametrize(
    ("name", "component", "count"),
    [("sd15_unet_kohya", "unet.", 278), ("sdxl_unet_kohya", "ldm_unet.", 788), ("flux_kohya", "bfl.", 304)],
)
def test_flattened_names_come_apart(name: str, component: str, count: int) -> None:
    names = listed(name)
    assert len(names) == count
    for flat, (dotted, _) in names.items():
        path = dotted.removeprefix(component)
        assert unflatten(flat.removeprefix("lora_unet_")) == path
        assert f"lora_unet_{flatten(path)}" == flat


def test_sdxl_names_are_those_of_diffusers_with_equal_shapes() -> None:
    shapes = listed("sdxl_unet_diffusers_modules")
    for dotted, shape in listed("sdxl_unet_kohya").values():
        native = dotted.removeprefix("ldm_unet.")
        path = sdxl.to_diffusers(native)
        assert path is not None
        assert shapes[path] == shape
        assert sdxl.from_diffusers(path) == native


def test_flux_names_are_those_of_diffusers_with_equal_shapes() -> None:
    shapes = listed("flux_diffusers_modules")
    for dotted, shape in listed("flux_kohya").values():
        native = dotted.removeprefix("bfl.")
        parts = flux.to_diffusers(native)
        assert parts is not None
        for path, rows in parts:
            assert shapes[path] == [shape[0] * rows.count // rows.units, shape[1]]
            assert flux.from_diffusers(path) == native
        assert sum(rows.count for _, rows in parts) == parts[0][1].units


@pytest.mark.parametrize("native", ["time_in.in_layer", "guidance_in.out_layer", "img_in", "final_layer.linear"])
def test_flux_modules_outside_the_blocks(native: str) -> None:
    parts = flux.to_diffusers(native)
    assert parts is not None
    ((path, rows),) = parts
    assert path in listed("flux_diffusers_modules")
    assert rows.is_whole
    assert flux.from_diffusers(path) == native


def test_scale_and_shift_of_the_last_norm_change_places() -> None:
    found = from_native("final_layer.adaLN_modulation.1")
    assert found is not None
    ((path, rows),) = found[1]
    assert path == "norm_out.linear"
    assert rows.indices(6).tolist() == [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize(
    ("native", "path", "layout"),
    [
        ("joint_blocks.3.x_block.attn.proj", "transformer_blocks.3.attn.to_out.0", sd3),
        ("joint_blocks.0.context_block.mlp.fc2", "transformer_blocks.0.ff_context.net.2", sd3),
        ("joint_blocks.0.x_block.attn2.qkv", "transformer_blocks.0.attn2.to_k", sd3),
    ],
)
def test_sd3_names(native: str, path: str, layout: Any) -> None:
    assert path in dict(layout.to_diffusers(native))
    assert layout.from_diffusers(path) == native
    assert unflatten(flatten(native)) == native


@pytest.mark.parametrize(
    ("native", "path"),
    [
        ("blocks.7.self_attn.q", "blocks.7.attn1.to_q"),
        ("blocks.7.cross_attn.k_img", "blocks.7.attn2.add_k_proj"),
        ("blocks.0.cross_attn.o", "blocks.0.attn2.to_out.0"),
        ("blocks.0.ffn.0", "blocks.0.ffn.net.0.proj"),
    ],
)
def test_wan_names(native: str, path: str) -> None:
    assert wan.to_diffusers(native) == path
    assert wan.from_diffusers(path) == native
    assert unflatten(flatten(native)) == native


@pytest.mark.parametrize(
    "path", ["input_blocks.3.1.op", "output_blocks.1", "joint_blocks.0.x", "double_blocks.0.other"]
)
def test_unknown_native_names_are_not_guessed(path: str) -> None:
    assert from_native(path) is None


@pytest.mark.parametrize(
    ("target", "component", "path"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
        ("lora_te1_encoder_layers_0_mlp_fc1", "text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
        ("lora_te2_text_model_encoder_layers_9_self_attn_q_proj", "text_encoder_2",
         "text_model.encoder.layers.9.self_attn.q_proj"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder_3",
         "encoder.block.0.layer.0.SelfAttention.q"),
        ("lora_unet_mid_block_attentions_0_proj_in", "unet", "mid_block.attentions.0.proj_in"),
        ("lora_unet_middle_block_1_proj_in", "unet", "mid_block.attentions.0.proj_in"),
        ("lora_unet_transformer_blocks_2_img_mlp_net_0_proj", "transformer", "transformer_blocks.2.img_mlp.net.0.proj"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_q", "transformer",
         "single_transformer_blocks.0.attn.to_q"),
        ("lycoris_model_layers_3_self_attn_o_proj", "", "model.layers.3.self_attn.o_proj"),
    ],
)  # fmt: skip
def test_targets_of_sd_scripts(target: str, component: str, path: str) -> None:
    placement = kohya_names.place(target, is_flux=False)
    assert placement is not None
    (piece,) = placement.pieces
    assert piece.module == Module(component, path)
    assert piece.rows.is_whole


def test_the_second_text_encoder_of_flux_is_numbered_three() -> None:
    placement = kohya_names.place("lora_te3_encoder_block_0_layer_0_SelfAttention_q", is_flux=True)
    assert placement is not None
    assert placement.pieces[0].module.component == "text_encoder_2"
    assert list(kohya_names.arrange([placement.pieces[0].module], "flux")) == [
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    ]


@pytest.mark.parametrize("name", ["some_module", "lora_prior_te_x", "te_block"])
def test_other_prefixes_are_not_placed(name: str) -> None:
    assert kohya_names.place(name, is_flux=False) is None


def test_a_fused_module_lists_all_its_parts() -> None:
    module = Module("transformer", "single_transformer_blocks.1.proj_mlp")
    (found,) = native_placements([module], "flux", "transformer").items()
    assert found[0] == "single_blocks.1.linear1"
    assert [p.rows.count for p in found[1].pieces] == [1, 1, 1, 4]
    assert to_native(module.path, "flux") == ("single_blocks.1.linear1", Rows(((3, 7),), 7))


def test_a_module_without_a_native_name_is_named() -> None:
    module = Module("transformer", "transformer_blocks.1.attn.norm_q")
    with pytest.raises(KeyError, match="norm_q"):
        native_placements([module], "flux", "transformer")


@pytest.mark.parametrize(
    ("modules", "metadata", "model"),
    [
        ({Module("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"): (320, 768)}, {}, "sd"),
        ({Module("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"): (640, 2048)}, {}, "sdxl"),
        ({Module("unet", "down_blocks.2.attentions.0.transformer_blocks.9.ff.net.2"): (1280, 5120)}, {}, "sdxl"),
        ({Module("unet", "conv_in"): None}, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({Module("transformer", "single_transformer_blocks.0.proj_mlp"): None}, {}, "flux"),
        ({Module("transformer", "transformer_blocks.0.ff_context.net.2"): None}, {}, "sd3"),
        ({Module("transformer", "transformer_blocks.0.img_mlp.net.2"): None}, {}, "qwen"),
        ({Module("transformer", "blocks.0.attn1.to_q"): None}, {}, "wan"),
        ({Module("", "model.layers.0.mlp.up_proj"): None}, {}, None),
    ],
)
def test_the_model_is_told_by_its_modules(modules: Any, metadata: dict[str, str], model: str | None) -> None:
    assert model_of(modules, metadata) == model


class TestRows:
    def test_interleaved_heads(self) -> None:
        """Two heads of four rows: halves in transformers, neighbours in Meta's checkpoints."""
        rows = Rows(heads=2)
        assert rows.indices(8).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
        assert not rows.is_whole

    def test_parts(self) -> None:
        assert Rows.part(3, (1, 1, 1, 4)).indices(14).tolist() == [6, 7, 8, 9, 10, 11, 12, 13]

    def test_parts_that_do_not_divide_the_rows(self) -> None:
        with pytest.raises(ValueError, match="10 rows do not come in 3 parts"):
            Rows.part(0, (1, 1, 1)).indices(10)


class TestTargetModules:
    def test_complete_layers_are_named_by_their_leaves(self) -> None:
        targets = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qv"]
        assert target_modules(targets) == ["q_proj", "v_proj"]

    @pytest.mark.parametrize(
        "targets",
        [
            ["model.layers.1.q_proj", "model.layers.2.q_proj"],
            ["model.layers.0.q_proj", "model.layers.1.v_proj"],
            ["model.layers.0.q_proj", "lm_head"],
            ["encoder.layers.0.q_proj", "decoder.layers.0.q_proj"],
            ["blocks.0.net.0"],
        ],
    )
    def test_anything_else_in_full(self, targets: list[str]) -> None:
        assert target_modules(targets) == sorted(targets)
