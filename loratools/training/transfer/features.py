"""Inputs as numbers, for the discriminator: what a model makes of them, and what they look like."""

from __future__ import annotations

import math
import unicodedata
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools._lazy import torch
from loratools.training.prompts import collated, prompt_ids

if TYPE_CHECKING:
    from torch import Tensor

_BINS: Final = 64  # of n-grams of kinds of characters
_KINDS: Final = {"L": "a", "N": "0", "Z": " ", "P": ".", "S": ".", "C": "\n"}
N_PLAIN: Final = _BINS + 6


def pooled(model: Any, tokenizer: Any, prompts: Sequence[str], *, device: str) -> Tensor:
    """(prompts, width): the mean over tokens of the last hidden states, of one batch, in float64 on the CPU."""
    ids, mask, _ = collated([(prompt_ids(tokenizer, prompt) or [0], 1) for prompt in prompts], device)
    core = model.base_model if hasattr(model, "base_model") else model
    with torch.no_grad():
        states = core(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.double()
    weights = mask[..., None].double()
    return ((states * weights).sum(1) / weights.sum(1)).cpu()


def plain(insides: Sequence[str]) -> Tensor:
    """(inputs, N_PLAIN): lengths, shares of kinds of characters, and which kinds follow which, hashed."""
    return torch.tensor([_plain(inside.strip()) for inside in insides], dtype=torch.float64).reshape(-1, N_PLAIN)


def _plain(text: str) -> list[float]:
    kinds = "".join(_kind(character) for character in text)
    n = max(len(kinds), 1)
    lengths = [math.log1p(len(text)), math.log1p(len(text.split()))]
    shares = [kinds.count(kind) / n for kind in ("a", "A", "0", ".")]
    framed = f"^{kinds}$"
    bins = [0.0] * _BINS
    for size in (2, 3):
        for i in range(len(framed) - size + 1):
            bins[zlib.crc32(framed[i : i + size].encode()) % _BINS] += 1 / n
    return [*lengths, *shares, *bins]


def _kind(character: str) -> str:
    if character.isupper():
        return "A"
    return _KINDS.get(unicodedata.category(character)[0], "a")
