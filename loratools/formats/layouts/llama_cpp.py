"""llama.cpp: what it calls the modules of the models that transformers has, and whose rows it reorders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from loratools.formats.modules import WHOLE, Rows

# model_type of transformers -> architecture of llama.cpp.
ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "smolvlm": "llama",
    "granite": "granite",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
}
# Architectures for which the converter interleaves the halves of every head of q and k.
_INTERLEAVED: Final = ("llama", "granite")
_BLOCK: Final[Mapping[str, str]] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_TOP: Final[Mapping[str, str]] = {"model.embed_tokens": "token_embd", "lm_head": "output"}
_BACK: Final[Mapping[str, str]] = {
    **{name: path for path, name in _BLOCK.items() if path not in ("mlp.gate_up_proj", "mlp.gate")},
}
_TOP_BACK: Final[Mapping[str, str]] = {name: path for path, name in _TOP.items()}
EMBEDDING: Final = "token_embd"


def architecture(config: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the architecture of a model's config; None for one that is not in the table."""
    text = config.get("text_config")
    kinds = [config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None]
    return next((ARCHITECTURES[str(kind)] for kind in kinds if str(kind) in ARCHITECTURES), None)


def to_native(path: str) -> str | None:
    """`blk.3.attn_q` for `model.layers.3.self_attn.q_proj`; None for a module that it has no name for."""
    path = re.sub(r"(^|\.)(language_model|text_model)\.", r"\1", path)
    if path in _TOP:
        return _TOP[path]
    match = re.match(r"(?:model\.)?layers\.(\d+)\.(.+)$", path)
    if match is None or match[2] not in _BLOCK:
        return None
    return f"blk.{match[1]}.{_BLOCK[match[2]]}"


def from_native(name: str, arch: str) -> str | None:
    """The module of transformers that `name` stands for; None for one that is not in the table."""
    if name in _TOP_BACK:
        return _TOP_BACK[name]
    match = re.match(r"blk\.(\d+)\.(.+)$", name)
    if match is None or match[2] not in _BACK:
        return None
    leaf = "mlp.gate_up_proj" if (arch, match[2]) == ("phi3", "ffn_up") else _BACK[match[2]]
    return f"model.layers.{match[1]}.{leaf}"


def is_reordered(name: str, arch: str) -> bool:
    """Whether llama.cpp keeps the rows of this module in another order than transformers."""
    return arch in _INTERLEAVED and name.endswith((".attn_q", ".attn_k"))


def rows_of(name: str, arch: str, config: Mapping[str, Any]) -> Rows | None:
    """The rows of a module in transformers' order; None where the config does not tell the number of heads."""
    if not is_reordered(name, arch):
        return WHOLE
    text = config.get("text_config")
    fields = text if isinstance(text, Mapping) else config
    heads = fields.get("num_attention_heads")
    if name.endswith(".attn_k"):
        heads = fields.get("num_key_value_heads") or heads
    return Rows(heads=heads) if isinstance(heads, int) and heads > 0 else None


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether input and output embeddings are one; transformers' default is yes, but for Llama and its like no."""
    stated = config.get("tie_word_embeddings")
    return bool(stated) if stated is not None else str(config.get("model_type", "")).startswith("gemma")
