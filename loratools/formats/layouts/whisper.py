"""Whisper: OpenAI's own names of modules, and those of transformers."""

from __future__ import annotations

import re
from typing import Final

RULE: Final = "Whisper names"  # by which targets are placed

_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
_BLOCK = re.compile(
    r"^(encoder|decoder)\.blocks\.(\d+)\.(?:(attn|cross_attn)\.(query|key|value|out)|mlp\.([02])|(\w+_ln))$"
)
_NORMS = {"attn_ln": "self_attn_layer_norm", "cross_attn_ln": "encoder_attn_layer_norm", "mlp_ln": "final_layer_norm"}
_TOP = {"decoder.token_embedding": "decoder.embed_tokens"}


def to_transformers(path: str) -> str | None:
    """transformers' module of one of OpenAI's, None for any other path."""
    if path in _TOP:
        return f"model.{_TOP[path]}"
    match = _BLOCK.match(path)
    if match is None:
        return None
    side, layer, attention, projection, linear, norm = match.groups()
    stem = f"model.{side}.layers.{layer}"
    if attention:
        return f"{stem}.{'encoder_attn' if attention == 'cross_attn' else 'self_attn'}.{_ATTENTION[projection]}"
    if linear:
        return f"{stem}.{'fc1' if linear == '0' else 'fc2'}"
    return f"{stem}.{_NORMS[norm]}" if norm in _NORMS else None
