"""The order in which a model registers its modules, which some methods number them by."""

from __future__ import annotations

import re
from collections.abc import Iterable

_BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of Llama and its kin


def in_model_order(targets: Iterable[str]) -> tuple[str, ...]:
    """By layer, and inside a block as Llama and its kin do it; other names by the alphabet, which is a guess."""
    return tuple(sorted(targets, key=_key))


def is_known_order(targets: Iterable[str]) -> bool:
    """Whether `in_model_order` is no guess: one module of each layer, or modules of Llama's blocks alone."""
    keys = [_key(target)[:2] for target in targets]
    named = {place == len(_BLOCK) for _, place in keys}
    return len(set(map(repr, keys))) == len(keys) and len(named) <= 1


def _key(target: str) -> tuple[list[int], int, str]:
    leaf = target.rpartition(".")[2]
    layers = [int(number) for number in re.findall(r"(?:^|\.)(\d+)(?=\.|$)", target)]
    return (layers, _BLOCK.index(leaf) if leaf in _BLOCK else len(_BLOCK), target)
