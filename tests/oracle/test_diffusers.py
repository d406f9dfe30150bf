"""diffusers itself loads what a conversion wrote, and fuses exactly the delta that loratools says is in it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if not os.environ.get("CI"):  # where they must be installed, their absence is an error
    for name in ("diffusers", "peft", "transformers"):
        pytest.importorskip(name, reason="compares with diffusers: pip install 'loratools[oracle]'")

import diffusers
import peft

from loratools.adapter import Adapter
from loratools.files import load
from loratools.ops.convert import Convert, convert_file


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )


def into_flux(path: Path, model: Any) -> None:
    weights, alphas, metadata = diffusers.FluxPipeline.lora_state_dict(
        path, return_alphas=True, return_lora_metadata=True
    )
    diffusers.FluxPipeline.load_lora_into_transformer(weights, alphas, model, metadata=metadata)


def into_sd3(path: Path, model: Any) -> None:
    weights, metadata = diffusers.StableDiffusion3Pipeline.lora_state_dict(path, return_lora_metadata=True)
    diffusers.StableDiffusion3Pipeline.load_lora_into_transformer(weights, model, metadata=metadata)


def into_unet(path: Path, model: Any) -> None:
    pipeline = diffusers.StableDiffusionPipeline
    weights, alphas, metadata = pipeline.lora_state_dict(path, unet_config=model.config, return_lora_metadata=True)
    pipeline.load_lora_into_unet(weights, alphas, model, metadata=metadata)


# Name -> the model, the loader, its component, the modules that are trained.
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Path, Any], None], str, str]] = {
    "flux": (
        flux,
        into_flux,
        "transformer",
        r".*blocks\.\d+\.(attn\.(to|add)_\w+(\.0)?|ff\.net\.(0\.proj|2)|proj_mlp|proj_out|norm\.linear)",
    ),
    "sd3": (sd3, into_sd3, "transformer", r".*blocks\.\d+\.(attn\.(to|add)_\w+(\.0)?|ff\.net\.(0\.proj|2))"),
    "unet": (unet, into_unet, "unet", r".*(attn\d\.to_\w+(\.0)?|proj_in|proj_out|ff\.net\.(0\.proj|2)|conv1|conv2)"),
}
PIPELINES: dict[str, Any] = {
    "flux": diffusers.FluxPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "unet": diffusers.StableDiffusionPipeline,
}


def trained(name: str, folder: Path, only: str = "") -> Path:
    """An adapter as diffusers writes it: random factors, an alpha that is not the rank."""
    make, _, component, modules = MODELS[name]
    torch.manual_seed(7)
    model = make()
    layers = [
        n
        for n, m in model.named_modules()
        if re.fullmatch(modules, n) and n.startswith(only) and isinstance(m, nn.Linear | nn.Conv2d)
    ]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=layers, init_lora_weights=False)
    model.add_adapter(config)
    state = peft.get_peft_model_state_dict(model)
    assert len(state) > 10
    told = {f"{component}_lora_adapter_metadata": config.to_dict()}
    PIPELINES[name].save_lora_weights(folder, **{f"{component}_lora_layers": state}, **told)
    return folder / "pytorch_lora_weights.safetensors"


def deltas(adapter: Adapter, model: Any) -> dict[str, Tensor]:
    """By parameter of diffusers' model."""
    found: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for target, update in adapter.items():
        placement = adapter.format.place(target)
        assert placement is not None
        whole = update.delta(None)
        for piece in placement.pieces:
            key = f"{piece.module.path}.weight"
            found[key] = whole[piece.rows.indices(len(whole))].reshape(parameters[key].shape)
    return found


def fused(name: str, path: Path) -> dict[str, Tensor]:
    """What loading and fusing changes in diffusers' model, in float64."""
    make, into, _, _ = MODELS[name]
    torch.manual_seed(7)
    model = make().double()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    into(path, model)
    model.fuse_lora()
    after = {key.replace(".base_layer.", "."): p.detach() for key, p in model.named_parameters()}
    return {key: after[key] - p for key, p in before.items() if not torch.equal(after[key], p)}


@pytest.mark.parametrize("by_way_of", ["kohya", "comfy", "peft"])
@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_diffusers_fuses_our_delta(tmp_path: Path, name: str, by_way_of: str, metadata: bool) -> None:
    source = load(trained(name, tmp_path / "trained"))
    options = Convert(metadata=metadata, component=None)
    between = convert_file(source, tmp_path / f"between-{by_way_of}", by_way_of, Convert())[0].path
    saved, _ = convert_file(load(between), tmp_path / "out.safetensors", "diffusers", options)
    wanted = deltas(source, MODELS[name][0]())
    found = fused(name, saved.path)
    assert set(found) == set(wanted)
    for key, delta in wanted.items():
        assert (found[key] - delta.double()).norm() <= 1e-6 * delta.double().norm(), key


@pytest.mark.parametrize("name", ["flux", "unet"])
def test_diffusers_reads_the_kohya_file(tmp_path: Path, name: str) -> None:
    """By its own conversion of names and alphas; that of FLUX's single blocks knows the real widths alone."""
    source = load(trained(name, tmp_path / "trained", "transformer_blocks" if name == "flux" else ""))
    options = Convert(metadata=False, model="flux" if name == "flux" else None)  # FLUX and SD3 both have such blocks
    saved, report = convert_file(source, tmp_path / "kohya.safetensors", "kohya", options)
    assert "W_MODEL_UNKNOWN" not in report.notices
    wanted, found = deltas(source, MODELS[name][0]()), fused(name, saved.path)
    assert set(found) == set(wanted)
    for key, delta in wanted.items():
        assert (found[key] - delta.double()).norm() <= 1e-6 * delta.double().norm(), key
