"""The U-Net of Stable Diffusion: CompVis's names, which sd-scripts uses for SDXL, and those of diffusers."""

from __future__ import annotations

import re

_PER_BLOCK = 3  # entries of a block in the flat lists: layers_per_block + 1 in SD 1, 2 and XL
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_RESNET_BACK = {new: old for old, new in _RESNET.items()}
_TOP = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_TOP_BACK = {new: old for old, new in _TOP.items()}
_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
_MIDDLE_BACK = {new: old for old, new in _MIDDLE.items()}


def is_native(path: str) -> bool:
    """Whether a dotted path is one of CompVis's."""
    return path.startswith(("input_blocks.", "middle_block.", "output_blocks.")) or path in _TOP


def to_diffusers(path: str) -> str | None:
    """diffusers' name of a CompVis module; None for one that it does not have."""
    if path in _TOP:
        return _TOP[path]
    match = re.match(r"(input_blocks|output_blocks|middle_block)\.(\d+)(?:\.(\d+))?\.?(.*)$", path)
    if match is None:
        return None
    part, first, second, rest = match[1], int(match[2]), match[3], match[4]
    if part == "middle_block":
        # middle_block.1.proj_in has no second number; a resnet's layers begin with letters too
        rest = f"{second}.{rest}".strip(".") if second is not None else rest
        stem = _MIDDLE.get(str(first))
        return None if stem is None else _join(stem, rest, resnet="resnets" in stem)
    if second is None:
        return None
    if part == "input_blocks":
        block, layer = divmod(first - 1, _PER_BLOCK)
        if layer == _PER_BLOCK - 1:
            return f"down_blocks.{block}.downsamplers.0.conv" if (second, rest) == ("0", "op") else None
        side = "down_blocks"
    else:
        block, layer = divmod(first, _PER_BLOCK)
        if rest == "conv":
            return f"up_blocks.{block}.upsamplers.0.conv"
        side = "up_blocks"
    if second == "0":
        return _join(f"{side}.{block}.resnets.{layer}", rest, resnet=True)
    return _join(f"{side}.{block}.attentions.{layer}", rest, resnet=False) if second == "1" else None


def from_diffusers(path: str, *, attended: bool = True) -> str | None:
    """CompVis's name of a diffusers module; `attended`: whether an up-sampler's block has attention before it."""
    if path in _TOP_BACK:
        return _TOP_BACK[path]
    for stem, number in _MIDDLE_BACK.items():
        if path.startswith(f"{stem}."):
            rest = path.removeprefix(f"{stem}.")
            layer = _RESNET_BACK.get(rest) if "resnets" in stem else rest
            return None if layer is None else f"middle_block.{number}.{layer}"
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)$", path)
    if match is None:
        return None
    side, block, kind, entry, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{_PER_BLOCK * block + _PER_BLOCK}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{_PER_BLOCK * block + _PER_BLOCK - 1}.{2 if attended else 1}.conv"
    index = _PER_BLOCK * block + entry + (1 if side == "down" else 0)
    stem = f"{'input' if side == 'down' else 'output'}_blocks.{index}"
    if kind == "attentions":
        return f"{stem}.1.{rest}"
    name = _RESNET_BACK.get(rest)
    return None if name is None else f"{stem}.0.{name}"


def _join(stem: str, rest: str, *, resnet: bool) -> str | None:
    if not resnet:
        return f"{stem}.{rest}" if rest else None
    name = _RESNET.get(rest)
    return None if name is None else f"{stem}.{name}"
