"""What a conversion keeps: for every kind of update, how well each dialect that is written holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from loratools.families.base import Layout, Update
    from loratools.storage.base import TensorSpec

Grade = Literal["lossless", "exact", "lowered", "refused"]

GRADES: Final[Mapping[Grade, str]] = {
    "lossless": "tensors to the bit, alpha, config and metadata come back from there",
    "exact": "the same delta, with factors multiplied, padded with zeros or rounded once",
    "lowered": "as a LoRA: with `--exact` where it is one of a lower rank than the weight's, else approximated with "
    "`--rank` or `--energy`, the error printed; with `--base` where the family needs it",
    "refused": "named, and left out only with `--drop`",
}
DIALECTS: Final = ("peft", "kohya", "diffusers", "comfy", "gguf", "mlx")
# Dialects whose names are those of image models, or of language models, alone; the others name any module.
IMAGES: Final = frozenset({"diffusers", "comfy"})
TEXTS: Final = frozenset({"gguf", "mlx"})


def _row(*grades: Grade) -> Mapping[str, Grade]:
    return dict(zip(DIALECTS, grades, strict=True))


# A target is of one of the first kinds and may have some of the others; the worst grade of these holds.
MATRIX: Final[Mapping[str, Mapping[str, Grade]]] = {
    # order of the columns: peft, kohya, diffusers, comfy, gguf, mlx
    "LoRA": _row("lossless", "lossless", "lossless", "lossless", "lossless", "lossless"),
    "DoRA": _row("lossless", "lossless", "lossless", "lossless", "lowered", "lossless"),
    "LoHa": _row("lossless", "lossless", "lowered", "lossless", "lowered", "lowered"),
    "LoKr": _row("lossless", "lossless", "lowered", "lossless", "lowered", "lowered"),
    "LoKr of two whole factors": _row("lossless", "exact", "lowered", "exact", "lowered", "lowered"),
    "LoRA of fused projections": _row("exact", "exact", "exact", "exact", "exact", "exact"),
    "other families of LyCORIS": _row("lowered", "lossless", "lowered", "lossless", "lowered", "lowered"),
    "FourierFT and WaveFT": _row("lossless", "lowered", "lowered", "lowered", "lowered", "lowered"),
    "other methods of PEFT": _row("lowered", "lowered", "lowered", "lowered", "lowered", "lowered"),
    "difference of a norm or a bias": _row("refused", "lossless", "refused", "lossless", "refused", "refused"),
    # what a target may have or be of
    "a convolution": _row("lossless", "lossless", "lossless", "lossless", "refused", "refused"),
    "an embedding": _row("lossless", "refused", "refused", "refused", "lossless", "lossless"),
    "a transposed weight": _row("lossless", "refused", "refused", "refused", "refused", "refused"),
    "experts": _row("refused", "refused", "refused", "refused", "refused", "refused"),
    "a Tucker core of a LoRA": _row("exact", "lossless", "exact", "lossless", "refused", "refused"),
    "a magnitude along inputs": _row("lowered", "lossless", "lowered", "lossless", "lowered", "lowered"),
    "a bias of lora_B": _row("lossless", "refused", "lossless", "refused", "refused", "refused"),
    # of all targets together
    "scales that differ": _row("lossless", "lossless", "lossless", "lossless", "exact", "exact"),
    "ranks that differ": _row("lossless", "lossless", "lossless", "lossless", "exact", "exact"),
}

_KINDS: Final[Mapping[str, str]] = {
    "lora": "LoRA",
    "dora": "DoRA",
    "loha": "LoHa",
    "merged_lora": "LoRA of fused projections",
    **dict.fromkeys(("fourierft", "waveft"), "FourierFT and WaveFT"),
    **dict.fromkeys(
        ("full", "glora", "oft_lycoris", "boft_lycoris", "ia3_lycoris", "doha", "dokr"), "other families of LyCORIS"
    ),
}


def kinds_of(family: type[Update], specs: Mapping[str, TensorSpec], layout: Layout) -> frozenset[str]:
    """The rows that hold for a target."""
    shape = family.base_shape(specs, layout) or ()
    kind = _KINDS.get(family.family, "other methods of PEFT")
    if family.family == "lokr":
        kind = "LoKr of two whole factors" if {"lokr_w1", "lokr_w2"} <= set(specs) else "LoKr"
    if family.family == "full" and len(shape) == 1:
        kind = "difference of a norm or a bias"
    also = {
        "a convolution": len(shape) > 2 and layout.experts == 1,
        "an embedding": layout.embedding,
        "a transposed weight": layout.transposed and not layout.embedding,
        "experts": layout.experts > 1,
        "a Tucker core of a LoRA": "mid" in specs,
        "a magnitude along inputs": layout.magnitude_axis == 1 and not layout.embedding,
        "a bias of lora_B": "up_bias" in specs,
    }
    return frozenset({kind, *(name for name, holds in also.items() if holds)})


def grade(kinds: frozenset[str], dialect: str) -> Grade:
    """The worst grade of these rows."""
    order = list(GRADES)
    return max((MATRIX[kind][dialect] for kind in kinds), key=order.index)
