"""OneTrainer: its OMI files, whose fused projections come in numbered parts, and its flattened diffusers names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from formats.made import assert_close, f64, rand, write
from torch import Tensor

from loratools.files import load
from loratools.formats.modules import Module
from loratools.ops.convert import Convert, convert


def pair(stem: str, seed: int = 0) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_down.weight": rand(seed, 4, 16),
        f"{stem}.lora_up.weight": rand(seed + 1, 16, 4),
        f"{stem}.alpha": torch.tensor(2.0),
    }


FLUX = {
    "transformer.double_blocks.3.img_attn.qkv.1": ("transformer", "transformer_blocks.3.attn.to_k"),
    "transformer.double_blocks.3.txt_attn.qkv.2": ("transformer", "transformer_blocks.3.attn.add_v_proj"),
    "transformer.single_blocks.7.linear1.3": ("transformer", "single_transformer_blocks.7.proj_mlp"),
    "transformer.single_blocks.7.linear2": ("transformer", "single_transformer_blocks.7.proj_out"),
    "clip_l.text_model.encoder.layers.0.mlp.fc1": ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
    "t5.encoder.block.0.layer.0.SelfAttention.q": ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q"),
}
SDXL = {
    "unet.input_blocks.4.1.proj_in": ("unet", "down_blocks.1.attentions.0.proj_in"),
    "unet.output_blocks.2.2.conv": ("unet", "up_blocks.0.upsamplers.0.conv"),
    "clip_g.text_model.encoder.layers.0.mlp.fc2": ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc2"),
}
LEGACY = {
    "lora_transformer_transformer_blocks_3_attn_to_k": ("transformer", "transformer_blocks.3.attn.to_k"),
    "lora_transformer_single_transformer_blocks_7_proj_mlp": ("transformer", "single_transformer_blocks.7.proj_mlp"),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
}


@pytest.mark.parametrize(("names", "dialect"), [(FLUX, "omi"), (SDXL, "omi"), (LEGACY, "kohya")])
def test_every_target_is_placed(tmp_path: Path, names: dict[str, tuple[str, str]], dialect: str) -> None:
    path = write(tmp_path, "lora.safetensors", {k: t for name in names for k, t in pair(name).items()})
    adapter = load(path)
    assert adapter.format.name == dialect
    placed = {t: adapter.format.place(t) for t in adapter}
    assert {t: [p.module for p in place.pieces] for t, place in placed.items() if place} == {
        t: [Module(*name)] for t, name in names.items()
    }


def test_alpha_and_numbers_reach_diffusers(tmp_path: Path) -> None:
    tensors = {key: t for i, name in enumerate(FLUX) for key, t in pair(name, 2 * i).items()}
    tensors["bundle_emb.word.clip_l"] = rand(99, 2, 5)
    path = write(tmp_path, "lora.safetensors", tensors)
    made, _ = convert(load(path), "diffusers", Convert(drop=frozenset({"extras"})))
    assert set(made) == {f"{component}.{module}" for component, module in FLUX.values()}
    for name, (component, module) in FLUX.items():
        up, down = (f64(tensors[f"{name}.lora_{side}.weight"]) for side in ("up", "down"))
        assert_close(made[f"{component}.{module}"].delta(), 0.5 * up @ down)
        assert made.entries[f"{component}.{module}"].scale == 0.5
    assert set(load(path).extras) == {"bundle_emb.word.clip_l"}


def test_alpha_missing_or_zero_is_the_rank(tmp_path: Path) -> None:
    names = list(FLUX)[:3]
    tensors = {key: t for name in names for key, t in pair(name).items()}
    del tensors[f"{names[0]}.alpha"]
    tensors[f"{names[1]}.alpha"] = torch.tensor(0.0)
    adapter = load(write(tmp_path, "lora.safetensors", tensors))
    assert [adapter.entries[name].scale for name in names] == [1.0, 1.0, 0.5]
