"""What sd-scripts calls modules: a prefix for the component, then the path with every dot made an underscore."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from loratools.formats.layouts import Model, from_native, native_placements
from loratools.formats.layouts.flat import flatten, unflatten
from loratools.formats.modules import Module, Piece, Placement, lone

_PREFIX = re.compile(r"^(lora_unet|lora_te\d?|lora_transformer|lycoris)_(.+)$")
_TEXT_ENCODERS = {"lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
_NATIVE_PREFIXES = ("input_blocks", "middle_block", "output_blocks", "down_blocks", "up_blocks", "mid_block")
_CLIP = re.compile(r"^(?:text_model\.)?(?=encoder\.layers\.\d+\.|embeddings\.|final_layer_norm$)")


def clip_path(path: str) -> str:
    """A module of CLIP with `text_model.` before it, which transformers 5 dropped and every older file has."""
    return _CLIP.sub("text_model.", path)


def place(target: str, *, is_flux: bool) -> Placement | None:
    """The modules that a flattened name stands for; None where it is not one of sd-scripts or LyCORIS."""
    match = _PREFIX.match(target)
    if match is None:
        return None
    prefix, path = match[1], unflatten(match[2])
    if prefix == "lycoris":
        return lone("flattened name", "", path)
    if prefix == "lora_transformer":
        return lone("flattened name", "transformer", path)
    if prefix.startswith("lora_te"):
        # FLUX has CLIP-L and T5 only, which sd-scripts numbers 1 and 3
        second = "text_encoder_2" if is_flux else "text_encoder_3"
        component = _TEXT_ENCODERS.get(prefix) or {"lora_te3": second}.get(prefix)
        return None if component is None else lone("flattened name", component, clip_path(path))
    if (native := from_native(path)) is not None:
        rule, parts = native
        component = "unet" if rule == "SDXL names" else "transformer"
        return Placement(rule, tuple(Piece(Module(component, name), rows) for name, rows in parts))
    unet = path.startswith((*_NATIVE_PREFIXES, "conv_in", "conv_out", "time_embedding", "add_embedding"))
    return lone("flattened name", "unet" if unet else "transformer", path)


def arrange(modules: Collection[Module], model: Model | None) -> dict[str, Placement]:
    """sd-scripts' own targets for these modules; KeyError for a module that it has no name for."""
    targets: dict[str, Placement] = {}
    several = any(m.component in ("text_encoder_2", "text_encoder_3") for m in modules)
    for component in dict.fromkeys(m.component for m in modules):
        here = [m for m in modules if m.component == component]
        if component.startswith("text_encoder"):
            number = _number(component, model, several)
            targets |= {f"lora_te{number}_{flatten(clip_path(m.path))}": _whole(m) for m in here}
        elif component == "":
            targets |= {f"lycoris_{flatten(m.path)}": _whole(m) for m in here}
        elif component in ("unet", "transformer"):
            native = native_placements(here, model, component) if model in ("sdxl", "flux", "sd3", "wan") else None
            if native is None or (component == "unet") != (model == "sdxl"):
                native = {m.path: _whole(m) for m in here}
            targets |= {f"lora_unet_{flatten(path)}": placement for path, placement in native.items()}
        else:
            raise KeyError(here[0])
    return targets


def _number(component: str, model: Model | None, several: bool) -> str:
    if component == "text_encoder":
        return "1" if several or model in ("sdxl", "flux", "sd3") else ""
    return "3" if model == "flux" else component[-1]


def _whole(module: Module) -> Placement:
    return Placement("flattened name", (Piece(module),))


def inverts(placements: Mapping[str, Placement], *, is_flux: bool) -> bool:
    """Whether reading these names gives the same modules back."""
    return all((found := place(t, is_flux=is_flux)) and found.pieces == p.pieces for t, p in placements.items())
