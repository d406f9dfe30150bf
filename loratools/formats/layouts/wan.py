"""Wan: the authors' names, and those of diffusers."""

from __future__ import annotations

import re

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj", "v_img": "add_v_proj"}
_BLOCK = {
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items() if "img" not in old},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _ATTENTION.items()},
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_BACK = {new: old for old, new in _BLOCK.items()}


def is_native(path: str) -> bool:
    """Whether a dotted path is one of Wan's authors'."""
    match = re.match(r"blocks\.\d+\.(.+)$", path)
    return match is not None and match[1] in _BLOCK


def to_diffusers(path: str) -> str | None:
    """diffusers' name of a native module; None for one that it does not have."""
    match = re.match(r"(blocks\.\d+)\.(.+)$", path)
    return f"{match[1]}.{_BLOCK[match[2]]}" if match and match[2] in _BLOCK else None


def from_diffusers(path: str) -> str | None:
    """The native name of a diffusers module; None for one that it does not have."""
    match = re.match(r"(blocks\.\d+)\.(.+)$", path)
    return f"{match[1]}.{_BACK[match[2]]}" if match and match[2] in _BACK else None
