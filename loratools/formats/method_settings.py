"""What PEFT's methods keep in `adapter_config.json` rather than in tensors, read with suspicion."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from loratools.errors import InputError

Config = Mapping[str, Any]

# Those of PEFT whose filters are right: its coif4 and coif5 are not orthonormal, and it has none for higher orders.
SOUND_WAVELETS = [
    f"{kind}{order}"
    for kind, orders in (("db", range(1, 11)), ("sym", range(2, 11)), ("coif", range(1, 4)))
    for order in orders
]
_MAX_TERMS = 1000  # of a series whose later terms vanish: more is no honest config
_SEEDS = range(-(2**63), 2**64)  # what torch takes


def _problem(field: str, value: object, wanted: str) -> InputError:
    shown = repr(value)
    return InputError(f"adapter_config.json: {field} is {shown[:80]}, not {wanted}")


def number(config: Config, field: str, default: float) -> float:
    """A finite number of the config; InputError otherwise."""
    value = default if config.get(field) is None else config[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _problem(field, value, "a number")
    return float(value)


def flag(config: Config, field: str, default: bool | None = False) -> bool:
    """A flag of the config; InputError for another value, or where it is missing and has no default."""
    value = default if config.get(field) is None else config[field]
    if value is None:
        raise InputError(f"adapter_config.json states no {field}, which changes the delta; add it as it was trained")
    if not isinstance(value, bool):
        raise _problem(field, value, "true or false")
    return value


def adalora_scale(config: Config, target: str) -> float:
    """alpha over the initial rank, which pruning leaves as it was; an alpha of 0 or less stands for the rank kept."""
    initial, alpha = number(config, "init_r", 12), number(config, "lora_alpha", 8)
    if initial < 0:
        raise _problem("init_r", initial, "a rank")
    if alpha <= 0:
        masks = config.get("rank_pattern") or {}
        mask = next((mask for name, mask in masks.items() if name.startswith(f"{target}.lora_E")), None)
        if mask is not None and not isinstance(mask, list):
            raise _problem("rank_pattern", mask, "a list of flags for each target")
        alpha = initial if mask is None else float(sum(bool(kept) for kept in mask))
    return alpha / (initial + 1e-5)


def paca_scale(config: Config, target: str) -> float:
    """alpha over the rank, both 8 by default."""
    return number(config, "paca_alpha", 8) / number(config, "r", 8)


def ia3_settings(config: Config, target: str) -> Mapping[str, Any]:
    """Whether the target is a feed-forward module, by PEFT's rule: a regular expression, or the ends of names."""
    modules = config.get("feedforward_modules") or []
    if isinstance(modules, str):
        try:
            return {"feedforward": re.fullmatch(modules, target) is not None}
        except re.error as error:
            raise _problem("feedforward_modules", modules, f"a regular expression: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise _problem("feedforward_modules", modules, "a list of names")
    return {"feedforward": target.endswith(tuple(modules))}


def oft_settings(config: Config, target: str) -> Mapping[str, Any]:
    """How the triangles become rotations. Which parametrisation it is decides the sign, so that it must be stated."""
    terms = None
    if flag(config, "use_cayley_neumann", None):
        terms = config.get("num_cayley_neumann_terms", 5)
        if isinstance(terms, bool) or not isinstance(terms, int) or not 1 <= terms <= _MAX_TERMS:
            raise _problem("num_cayley_neumann_terms", terms, f"a number of terms up to {_MAX_TERMS}")
    radius = number(config, "eps", 6e-5) if flag(config, "coft") else None
    if radius is not None and radius < 0:
        raise _problem("eps", radius, "a radius")
    return {"terms": terms, "radius": radius, "shared": flag(config, "block_share")}


def hra_settings(config: Config, target: str) -> Mapping[str, Any]:
    """Whether the vectors are made orthogonal."""
    return {"orthogonal": flag(config, "apply_GS")}


def miss_settings(config: Config, target: str) -> Mapping[str, Any]:
    """Whether the block is repeated along the outputs too."""
    return {"mini": config.get("init_weights") == "mini"}


def gralora_scale(config: Config, target: str) -> float:
    """alpha over the rank of the blocks and that of the general LoRA beside them."""
    return number(config, "alpha", 64) / (number(config, "r", 32) + number(config, "hybrid_r", 0))


def road_settings(config: Config, target: str) -> Mapping[str, Any]:
    """How many angles each pair of outputs has, and the size of the groups in which they are paired."""
    variant, group = config.get("variant", "road_1"), config.get("group_size", 64)
    if variant not in ("road_1", "road_2", "road_4"):
        raise _problem("variant", variant, "road_1, road_2 or road_4")
    if isinstance(group, bool) or not isinstance(group, int) or group < 2 or group % 2:
        raise _problem("group_size", group, "an even number")
    return {"variant": int(variant[-1]), "group": group}


def vera_settings(config: Config, target: str) -> Mapping[str, Any]:
    """The seed of the projections, where they were not meant to be saved."""
    if flag(config, "save_projection", True):
        return {}
    return {"seed": _seed(config, "projection_prng_key", 0)}


def randlora_scale(config: Config, target: str) -> float:
    """alpha over the rank."""
    return number(config, "randlora_alpha", 640) / number(config, "r", 32)


def randlora_settings(config: Config, target: str) -> Mapping[str, Any]:
    """The seed of the projections, where they were not meant to be saved, and how they are drawn from it."""
    sparse, very = flag(config, "sparse"), flag(config, "very_sparse")
    draw = "very_sparse" if very else "sparse" if sparse else "dense"
    return {**vera_settings(config, target), "draw": draw}


def fourier_settings(config: Config, target: str) -> Mapping[str, Any]:
    """The seed of the places of the coefficients."""
    return {"seed": _seed(config, "random_loc_seed", 777)}


def wavelet_settings(config: Config, target: str) -> Mapping[str, Any]:
    """The seed of the places of the coefficients, and the wavelet that they belong to, if to any."""
    wavelet = config.get("wavelet_family", "db1")
    if wavelet not in SOUND_WAVELETS:
        raise _problem("wavelet_family", wavelet, "one of which PEFT has sound filters: db1-10, sym2-10 or coif1-3")
    return {**fourier_settings(config, target), "wavelet": wavelet if flag(config, "use_idwt", True) else None}


def vblora_settings(config: Config, target: str) -> Mapping[str, Any]:
    """How many vectors are mixed."""
    topk = config.get("topk", 2)
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise _problem("topk", topk, "a number of vectors")
    return {"topk": topk}


def tinylora_seed(config: Config, index: int) -> int:
    """The seed of the projections of the target that the model registers as number `index`."""
    return _seed(config, "projection_seed", 42) + index


def tinylora_group(config: Config, index: int, count: int) -> int:
    """The number of the vector of that target, of `count` targets."""
    tied = number(config, "weight_tying", 0.0)
    if not 0 <= tied <= 1:
        raise _problem("weight_tying", tied, "a share")
    groups = max(1, round(count * (1 - tied)))
    return min(index // max(1, count // groups), groups - 1)


def _seed(config: Config, field: str, default: int) -> int:
    seed = config.get(field, default)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed not in _SEEDS:
        raise _problem(field, seed, "a seed")
    return seed


def token_settings(config: Config, target: str) -> Mapping[str, Any]:
    """The tokens whose rows are replaced: a list for all tables, or one for each by the end of its name."""
    field = "token_indices" if "token_indices" in config else "trainable_token_indices"
    listed = config.get(field)
    if isinstance(listed, dict):
        fits = [name for name in listed if target.endswith(name)]
        if len(fits) > 1:
            fits = [name for name in fits if name == target]
        if len(fits) != 1:
            raise InputError(f"adapter_config.json: {field} does not tell the tokens of {target} in a single entry")
        listed = listed[fits[0]]
    tokens = [t for t in listed if type(t) is int and 0 <= t < 2**63] if isinstance(listed, list) else []
    if listed != tokens or len(set(tokens)) != len(tokens):
        raise _problem(field, listed, "a list of different token numbers")
    return {"tokens": tuple(tokens)}
