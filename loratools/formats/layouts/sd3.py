"""Stable Diffusion 3: Stability's joint blocks, whose attention is fused, and the names of diffusers."""

from __future__ import annotations

import re

from loratools.formats.modules import WHOLE, Rows

_QKV = (1, 1, 1)


def _attention(native: str, names: tuple[str, str, str]) -> dict[str, list[tuple[str, Rows]]]:
    return {native: [(name, Rows.part(i, _QKV)) for i, name in enumerate(names)]}


_JOINT = {
    **_attention("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    **_attention("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    **_attention("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    "x_block.attn.proj": [("attn.to_out.0", WHOLE)],
    "x_block.attn2.proj": [("attn2.to_out.0", WHOLE)],
    "context_block.attn.proj": [("attn.to_add_out", WHOLE)],
    "x_block.mlp.fc1": [("ff.net.0.proj", WHOLE)],
    "x_block.mlp.fc2": [("ff.net.2", WHOLE)],
    "context_block.mlp.fc1": [("ff_context.net.0.proj", WHOLE)],
    "context_block.mlp.fc2": [("ff_context.net.2", WHOLE)],
    "x_block.adaLN_modulation.1": [("norm1.linear", WHOLE)],
    "context_block.adaLN_modulation.1": [("norm1_context.linear", WHOLE)],
}
_BACK = {name: native for native, parts in _JOINT.items() for name, _ in parts}


def is_native(path: str) -> bool:
    """Whether a dotted path is one of Stability's."""
    return path.startswith("joint_blocks.")


def to_diffusers(path: str) -> list[tuple[str, Rows]] | None:
    """diffusers' modules of a native one, with the rows of each; None for one that it does not have."""
    match = re.match(r"joint_blocks\.(\d+)\.(.+)$", path)
    parts = _JOINT.get(match[2]) if match else None
    return (
        None if match is None or parts is None else [(f"transformer_blocks.{match[1]}.{n}", rows) for n, rows in parts]
    )


def from_diffusers(path: str) -> str | None:
    """The native module that a diffusers module is, or is a part of."""
    match = re.match(r"transformer_blocks\.(\d+)\.(.+)$", path)
    native = _BACK.get(match[2]) if match else None
    return None if match is None or native is None else f"joint_blocks.{match[1]}.{native}"
