"""Files of methods that build on the base weight, spelt as their authors' code spells them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loldu() -> dict[str, Tensor]:
    """What `get_loldu_state_dict` collects, and the scale that a variant of it keeps."""
    at = "encoder.layer.{}.attention.self.query.parametrizations.weight.0.{}".format
    return {at(0, "vector_z"): rand(0, 4), at(1, "vector_z"): rand(1, 4), at(1, "scaling_factor"): torch.tensor(0.5)}


def salt() -> dict[str, Tensor]:
    """What is trained of SAM, as the hiera backbone names it."""
    at = "image_encoder.trunk.blocks.0.attn.qkv"
    return {
        f"{at}.trainable_scale_A": 1 + rand(0, 2) / 8,
        f"{at}.trainable_shift_B": rand(1, 2) / 8,
        f"{at}.trainable_X": rand(2, 8, 3) / 4,
        f"{at}.trainable_Y": rand(3, 3, 8) / 4,
        "mask_decoder.iou_token.weight": rand(4, 1, 5),
    }


def hydra() -> dict[str, Tensor]:
    """The trainables of the ViT, with one layer as CLIP's and one as BERT's code names it."""
    tensors = {"head.weight": rand(0, 3, 6)}
    for seed, (at, outputs, inputs) in enumerate(
        (("blocks.0.mlp.hydra_mlp_{}", 6, 9), ("blocks.0.attn.hydra_proj_{}", 6, 6), ("h.mlp.ad_lin.adapter_{}", 6, 9))
    ):
        for branch, seen in (("par", inputs), ("seq", outputs)):
            name = at.format(branch)
            tensors |= {f"{name}.down_proj.weight": rand(seed, 2, seen), f"{name}.down_proj.bias": rand(seed + 1, 2)}
            tensors |= {f"{name}.up_proj.weight": rand(seed + 2, outputs, 2)}
            tensors |= {f"{name}.up_proj.bias": rand(seed + 3, outputs)}
    tensors |= {f"h.mlp.ad_lin.adapter_{branch}.scale": rand(9, 1) for branch in ("par", "seq")}
    for branch, seen in (("par", 9), ("seq", 6)):
        tensors |= {f"bert.layer.0.output.hydra_{branch}.hydra_A.weight": rand(7, 2, seen)}
        tensors |= {f"bert.layer.0.output.hydra_{branch}.hydra_B.weight": rand(8, 6, 2)}
    return tensors


def snell() -> dict[str, Tensor]:
    """A whole model's state dict: a SNELL, a KLoRA and a SNELLA module, and what they stand beside."""
    tensors = {"blocks.0.attn.q.weight": rand(0, 6, 5), "head.weight": rand(1, 3, 6)}
    coefficients = torch.tensor([0.1, -0.1]).reshape(2, 1, 1)
    for seed, (at, ends) in enumerate(
        (("attn.additional_q", ""), ("attn.additional_v", "_1"), ("mlp.additional_fc1", ""))
    ):
        name = f"blocks.0.{at}.learnable"
        tensors |= {f"{name}.In_Qs{ends}": rand(seed, 2, 5, 4), f"{name}.Out_Qs{ends}": rand(seed + 9, 2, 6, 4)}
        tensors[f"{name}.shared_coeff_fc"] = coefficients
    tensors |= {
        f"{name}.{part}": torch.tensor([value]) for part, value in (("alpha", 1.0), ("gamma", 0.5), ("beta", 0.1))
    }
    return tensors


FILES = {"snell": snell, "hydra": hydra, "loldu": loldu, "salt": salt}


def write(folder: Path, name: str) -> Path:
    torch.save(FILES[name](), folder / f"{name}.pt")
    return folder / f"{name}.pt"
