"""What follows a module's name in the files of kohya, LyCORIS and ComfyUI: one table for all dialects that share it."""

from __future__ import annotations

from collections.abc import Mapping

ALPHA = "alpha"

SLOTS: Mapping[str, str] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "dora_scale": "magnitude",
    "hada_w1_a": "hada_w1_a",
    "hada_w1_b": "hada_w1_b",
    "hada_w2_a": "hada_w2_a",
    "hada_w2_b": "hada_w2_b",
    "hada_t1": "hada_t1",
    "hada_t2": "hada_t2",
    "lokr_w1": "lokr_w1",
    "lokr_w1_a": "lokr_w1_a",
    "lokr_w1_b": "lokr_w1_b",
    "lokr_w2": "lokr_w2",
    "lokr_w2_a": "lokr_w2_a",
    "lokr_w2_b": "lokr_w2_b",
    "lokr_t2": "lokr_t2",
}
SUFFIXES: Mapping[str, str] = {slot: suffix for suffix, slot in SLOTS.items()}

# Families that files with these suffixes may hold.
LYCORIS = frozenset({"lora", "dora", "loha", "lokr"})

# Suffixes of what is not supported, by their beginning where that ends in an underscore, and what it is.
OTHER: Mapping[str, str] = {
    "oft_blocks": "OFT",
    "diff": "a full difference",
    "diff_b": "a full difference",
    "w_norm": "a norm difference",
    "b_norm": "a norm difference",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "on_input": "IA3",
    "weight": "IA3",
    "lambda_layer": "T-LoRA",
}


def unsupported_family(suffix: str) -> str | None:
    """What a module with this suffix is, where it is known and not supported."""
    return OTHER.get(suffix)
