"""How image models name their modules: natively, as their authors do, and in diffusers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal, get_args

from loratools.formats.layouts import flux, sd3, sdxl, wan
from loratools.formats.modules import WHOLE, Module, Piece, Placement, Rows

Model = Literal["sd", "sdxl", "flux", "sd3", "wan", "qwen"]
MODELS: tuple[Model, ...] = get_args(Model)

# What names say of the model, by the rule that read them.
NATIVE_RULES: Mapping[str, Model] = {
    "FLUX names": "flux",
    "XLabs names": "flux",
    "SD3 names": "sd3",
    "SDXL names": "sdxl",
    "Wan names": "wan",
}

_SDXL_CONTEXT = 2048  # columns of what SDXL's cross attention reads


def from_native(path: str) -> tuple[str, list[tuple[str, Rows]]] | None:
    """(rule, diffusers' modules with their rows) of a path that a model's authors use; None for any other."""
    if flux.is_native(path):
        parts = flux.to_diffusers(path)
        return None if parts is None else ("FLUX names", parts)
    if sd3.is_native(path):
        parts = sd3.to_diffusers(path)
        return None if parts is None else ("SD3 names", parts)
    for rule, layout in (("SDXL names", sdxl), ("Wan names", wan)):
        if layout.is_native(path):
            name = layout.to_diffusers(path)
            return None if name is None else (rule, [(name, WHOLE)])
    return None


def to_native(path: str, model: Model) -> tuple[str, Rows] | None:
    """The authors' module that a diffusers module is or is a part of, with its rows there; None where there is none."""
    name: str | None
    if model == "flux":
        name = flux.from_diffusers(path)
        parts = flux.to_diffusers(name) if name else None
    elif model == "sd3":
        name = sd3.from_diffusers(path)
        parts = sd3.to_diffusers(name) if name else None
    else:
        name = sdxl.from_diffusers(path) if model == "sdxl" else wan.from_diffusers(path) if model == "wan" else path
        parts = [(path, WHOLE)] if name else None
    if name is None or parts is None:
        return None
    return name, dict(parts)[path]


def native_placements(modules: Collection[Module], model: Model, component: str) -> dict[str, Placement]:
    """The authors' modules, by dotted path, that hold all `modules`; KeyError for one that has no native name.

    A fused module lists all its parts, those that nothing changes included.
    """
    found: dict[str, Placement] = {}
    for module in modules:
        native = to_native(module.path, model)
        if native is None:
            raise KeyError(module)
        name = native[0]
        if name not in found:
            _, parts = from_native(name) or ("", [(module.path, WHOLE)])
            found[name] = Placement(model, tuple(Piece(Module(component, path), rows) for path, rows in parts))
    return found


def model_of(shapes: Mapping[Module, tuple[int, ...] | None], metadata: Mapping[str, str]) -> Model | None:
    """The model whose modules these are, from names, shapes and what the metadata says; None where nothing tells."""
    said = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    paths = [m.path for m in shapes if m.component in ("transformer", "")]
    if any(path.startswith("single_transformer_blocks.") for path in paths) or "flux" in said:
        return "flux"
    if any(re.match(r"blocks\.\d+\.(attn[12]|ffn)\.", path) for path in paths):
        return "wan"
    if any(re.match(r"transformer_blocks\.\d+\.(img|txt)_(mlp|mod)\.", path) for path in paths) or "qwen" in said:
        return "qwen"
    if any(re.match(r"transformer_blocks\.\d+\.(ff_context|norm1_context)\.", path) for path in paths):
        return "sd3"
    if "sd3" in said or "stable-diffusion-3" in said:
        return "sd3"
    unet = {m: shape for m, shape in shapes.items() if m.component == "unet"}
    if any(m.component == "text_encoder_2" for m in shapes) or "xl" in said:
        return "sdxl"
    for module, shape in unet.items():
        deep = re.search(r"transformer_blocks\.([1-9]\d*)\.", module.path)
        reads = module.path.endswith(("attn2.to_k", "attn2.to_v")) and shape is not None and len(shape) > 1
        if deep or (reads and shape is not None and shape[1] == _SDXL_CONTEXT):
            return "sdxl"
    return "sd" if unet else None
