"""The fields of PEFT's LoraConfig that say ranks, alphas and targets; diffusers keeps the same in its metadata."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from loratools.errors import InputError

if TYPE_CHECKING:
    from loratools.formats.base import Written

Config = Mapping[str, Any]
DEFAULT_ALPHA = 8  # what PEFT assumes where a config lacks lora_alpha
LATENT = "_lora_latent_mapping.weight"  # ends the keys of the matrices between the factors of a LoRA-XS
_EXACTLY = 1e-12
# Fields by what they are about: which of the modules that match are meant, tensors beside the updates, tensors, scales.
SELECTORS = ("exclude_modules", "layers_to_transform", "layers_pattern")
OF_EXTRAS = ("modules_to_save", "trainable_token_indices")
_COMPUTED = frozenset({"use_dora", "lora_bias", "fan_in_fan_out"})
_SCALING = frozenset({"use_rslora", "rank_pattern", "alpha_pattern", "r", "lora_alpha", "alpha"})


def has_latent_mapping(keys: Iterable[str]) -> bool:
    """Whether these are keys of a LoRA-XS or LoRA-SB, whose other keys and config are those of a LoRA."""
    return any(key.endswith(LATENT) for key in keys)


def pattern_value(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's own rule: the first key that matches the end of `name` at a dot, as a regular expression, decides."""
    return next((value for key, value in pattern.items() if _end_matcher(key).match(name)), default)


@cache  # a pattern for each of a thousand targets is more than `re` remembers
def _end_matcher(key: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise InputError(f"the pattern {key!r} of the LoRA config is not a regular expression: {error}") from error


def stated_scale(config: Config, target: str, rank: int) -> float:
    """The scale that `config` gives a target of this rank."""
    alpha = pattern_value(config.get("alpha_pattern") or {}, target, config.get("lora_alpha", DEFAULT_ALPHA))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"the alpha of {target} in the LoRA config is {alpha!r}, not a number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def states(config: Config, written: Mapping[str, Written], *, tolerance: float = _EXACTLY) -> bool:
    """Whether `config` gives every target its rank, and its scale to `tolerance`."""
    ranks = config.get("rank_pattern") or {}
    return all(
        pattern_value(ranks, target, config.get("r")) == w.rank
        and math.isclose(stated_scale(config, target, w.rank), w.scale, rel_tol=tolerance)
        for target, w in written.items()
    )


def rank_fields(config: Config, written: Mapping[str, Written]) -> dict[str, Any]:
    """r, lora_alpha, their patterns and use_rslora, true for `written`; nothing where they are true already."""
    if states(config, written):
        return {}
    rslora = bool(config.get("use_rslora")) and any(w.scale != 1.0 for w in written.values())
    alphas = {t: _tidy(w.scale * (math.sqrt(w.rank) if rslora else w.rank)) for t, w in written.items()}
    ranks = {t: w.rank for t, w in written.items()}
    r, alpha = Counter((ranks[t], alphas[t]) for t in written).most_common(1)[0][0]
    fields: dict[str, Any] = {"r": r, "lora_alpha": alpha, "use_rslora": rslora}
    for spelled in (lambda t: t, lambda t: f"^{re.escape(t)}$"):
        fields["rank_pattern"] = {spelled(t): k for t, k in ranks.items() if k != r}
        fields["alpha_pattern"] = {spelled(t): a for t, a in alphas.items() if a != alpha}
        if states({**config, **fields}, written):
            break
    return fields


def still_true(config: Config, *, same_targets: bool, portable: bool, without_extras: bool) -> dict[str, Any]:
    """`config` without what a new adapter computes, and without what no longer holds: scales where the new one is
    `portable`, the choice of modules where targets differ, and what is about tensors beside the updates."""
    gone = {*_COMPUTED}
    if portable:
        gone |= _SCALING
    if not same_targets:
        gone |= {"target_modules", *SELECTORS}
    if without_extras:
        gone |= {"bias", *OF_EXTRAS}
    return {key: value for key, value in config.items() if key not in gone}


def target_modules(targets: list[str]) -> list[str]:
    """The last names of the modules where these stand for just these targets: the same in every layer from 0 on.

    Full names otherwise, for a last name that matches more modules than were trained gives those an adapter too.
    """
    layers: dict[str, set[str]] = {}
    for target in targets:
        match = re.match(r"(.*?\.\d+)\.(.+)$", target)
        if match is None:
            return sorted(targets)
        layers.setdefault(match[1], set()).add(match[2])
    numbers = {int(layer.rpartition(".")[2]) for layer in layers}
    one_stack = len({layer.rpartition(".")[0] for layer in layers}) == 1
    alike = len({frozenset(paths) for paths in layers.values()}) == 1
    leaves = {target.rpartition(".")[2] for target in targets}
    if alike and one_stack and numbers == set(range(len(layers))) and not any(leaf.isdecimal() for leaf in leaves):
        return sorted(leaves)
    return sorted(targets)


def _tidy(alpha: float) -> float | int:
    """An integer where it is one to rounding, for loaders that declare alpha as int."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-14) else alpha
