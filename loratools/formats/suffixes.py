"""What follows a module's name in the files of kohya, LyCORIS and ComfyUI: one table for all dialects that share it."""

from __future__ import annotations

from collections.abc import Mapping

ALPHA = "alpha"

# Where two suffixes stand for one slot, the last is how a new key is spelt.
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
    "w_norm": "diff",
    "diff": "diff",
    "oft_blocks": "oft_blocks",
    "rescale": "rescale",
    "a1.weight": "glora_a1",
    "a2.weight": "glora_a2",
    "b1.weight": "glora_b1",
    "b2.weight": "glora_b2",
    "bm.weight": "glora_bm",
    "on_input": "on_input",
    "weight": "ia3_weight",
}
SUFFIXES: Mapping[str, str] = {slot: suffix for suffix, slot in SLOTS.items()} | {"boft_blocks": "oft_blocks"}

# Changes of the module's bias, each a target of its own: a bias may change beside a weight of any family, or alone.
BIAS_SLOTS: Mapping[str, str] = {"b_norm": "diff", "diff_b": "diff"}

# Families that files with these suffixes may hold.
LYCORIS = frozenset(
    {"lora", "dora", "loha", "lokr", "doha", "dokr", "full", "glora", "oft_lycoris", "boft_lycoris", "ia3_lycoris"}
)

KINDRED: Mapping[str, str] = {
    "oft": "LyCORIS's OFT rotates outputs, PEFT's rotates inputs",
    "boft": "LyCORIS's BOFT rotates outputs, PEFT's rotates inputs",
    "ia3": "LyCORIS's IA3 leaves the bias as it is, PEFT's scales that of outputs too",
}

# Suffixes that other files than adapters have too: a module with one is taken for an adapter only beside the second.
_COMMON: Mapping[str, str] = {
    "weight": "on_input",
    "rescale": "oft_blocks",
    "a1.weight": "a2.weight",
    "a2.weight": "a1.weight",
    "b1.weight": "b2.weight",
    "b2.weight": "b1.weight",
    "bm.weight": "b2.weight",
}

# What cannot be worked on: a suffix that no other family has -> what the module is, and why it cannot.
UNSUPPORTED: Mapping[str, str] = {
    "lambda_layer": "T-LoRA: its delta is relative to initial factors that the file does not hold"
}


def is_slot(suffix: str, siblings: Mapping[str, str]) -> bool:
    """Whether a tensor with this suffix belongs to an update, where its module has the `siblings` (by suffix)."""
    return (suffix in SLOTS or suffix in BIAS_SLOTS) and _COMMON.get(suffix, suffix) in siblings


def place(module: str, suffix: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """The target and slot of a tensor for which `is_slot`; butterflies of blocks differ from diagonals by an axis."""
    if suffix in BIAS_SLOTS:
        return f"{module}.bias", BIAS_SLOTS[suffix]
    return module, "boft_blocks" if suffix == "oft_blocks" and len(shape) == 4 else SLOTS[suffix]


def changes_bias(slots: Mapping[str, str]) -> bool:
    """Whether the keys of a target, by slot, are those of a change of a bias."""
    return slots.get("diff", "").endswith(tuple(f".{suffix}" for suffix in BIAS_SLOTS))


def spelling(slot: str, shape: tuple[int, ...] | None) -> str:
    """The suffix of a slot in a new file, for a base parameter of `shape`; only norms have weights of one axis."""
    return "w_norm" if slot == "diff" and shape is not None and len(shape) == 1 else SUFFIXES[slot]
