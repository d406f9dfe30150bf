"""FLUX: Black Forest Labs' names, whose projections are fused, and those of diffusers."""

from __future__ import annotations

import re

from loratools.formats.modules import WHOLE, Rows

_QKV = (1, 1, 1)
_QKV_MLP = (1, 1, 1, 4)  # the MLP is four times as wide
# What follows `double_blocks.i.` -> parts after `transformer_blocks.i.`, each with its rows.
_DOUBLE = {
    "img_attn.qkv": [(f"attn.{name}", Rows.part(i, _QKV)) for i, name in enumerate(("to_q", "to_k", "to_v"))],
    "txt_attn.qkv": [
        (f"attn.{name}", Rows.part(i, _QKV)) for i, name in enumerate(("add_q_proj", "add_k_proj", "add_v_proj"))
    ],
    "img_attn.proj": [("attn.to_out.0", WHOLE)],
    "txt_attn.proj": [("attn.to_add_out", WHOLE)],
    "img_mlp.0": [("ff.net.0.proj", WHOLE)],
    "img_mlp.2": [("ff.net.2", WHOLE)],
    "txt_mlp.0": [("ff_context.net.0.proj", WHOLE)],
    "txt_mlp.2": [("ff_context.net.2", WHOLE)],
    "img_mod.lin": [("norm1.linear", WHOLE)],
    "txt_mod.lin": [("norm1_context.linear", WHOLE)],
}
_SINGLE = {
    "linear1": [
        (name, Rows.part(i, _QKV_MLP)) for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    ],
    "linear2": [("proj_out", WHOLE)],
    "modulation.lin": [("norm.linear", WHOLE)],
}
_EMBEDDERS = {
    "time_in": "time_text_embed.timestep_embedder",
    "vector_in": "time_text_embed.text_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
}
_TOP = {
    "img_in": [("x_embedder", WHOLE)],
    "txt_in": [("context_embedder", WHOLE)],
    "final_layer.linear": [("proj_out", WHOLE)],
    # Scale and shift have changed places.
    "final_layer.adaLN_modulation.1": [("norm_out.linear", Rows(((1, 2), (0, 1)), 2))],
    **{
        f"{native}.{layer}_layer": [(f"{new}.linear_{i}", WHOLE)]
        for native, new in _EMBEDDERS.items()
        for i, layer in ((1, "in"), (2, "out"))
    },
}

Parts = list[tuple[str, Rows]]


def is_native(path: str) -> bool:
    """Whether a dotted path is one of Black Forest Labs'."""
    return path.startswith(("double_blocks.", "single_blocks.")) or path in _TOP


def to_diffusers(path: str) -> Parts | None:
    """diffusers' modules of a native one, with the rows of each; None for one that it does not have."""
    if path in _TOP:
        return _TOP[path]
    match = re.match(r"(double|single)_blocks\.(\d+)\.(.+)$", path)
    if match is None:
        return None
    table, stem = (_DOUBLE, "transformer_blocks") if match[1] == "double" else (_SINGLE, "single_transformer_blocks")
    parts = table.get(match[3])
    return None if parts is None else [(f"{stem}.{match[2]}.{name}", rows) for name, rows in parts]


_DOUBLE_BACK = {name: native for native, parts in _DOUBLE.items() for name, _ in parts}
_SINGLE_BACK = {name: native for native, parts in _SINGLE.items() for name, _ in parts}
_TOP_BACK = {name: native for native, parts in _TOP.items() for name, _ in parts}


def from_diffusers(path: str) -> str | None:
    """The native module that a diffusers module is, or is a part of."""
    if path in _TOP_BACK:
        return _TOP_BACK[path]
    match = re.match(r"(single_)?transformer_blocks\.(\d+)\.(.+)$", path)
    if match is None:
        return None
    native = (_SINGLE_BACK if match[1] else _DOUBLE_BACK).get(match[3])
    return None if native is None else f"{'single' if match[1] else 'double'}_blocks.{match[2]}.{native}"
