"""Configs under which PEFT makes modules of its other methods with just the tensors that targets have."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from loratools.errors import UnsupportedInTargetError
from loratools.formats.base import Part
from loratools.formats.lora_config import target_modules
from loratools.formats.method_settings import SOUND_WAVELETS

# The families that can be written, and the PEFT types that they are.
WRITABLE: Mapping[str, str] = {
    "loha": "LOHA",
    "lokr": "LOKR",
    "shira": "SHIRA",
    "fourierft": "FOURIERFT",
    "waveft": "WAVEFT",
    "vera": "VERA",
    "randlora": "RANDLORA",
}

_TAPS = (1, 9, 3, 25, 27, 49)  # of the kernels that there are

KINDRED: Mapping[str, str] = {
    "oft_lycoris": "PEFT's OFT rotates inputs, LyCORIS's rotates outputs",
    "boft_lycoris": "PEFT's BOFT rotates inputs, LyCORIS's rotates outputs",
    "ia3_lycoris": "PEFT's IA3 scales the bias of outputs too, LyCORIS's does not",
    "doha": "PEFT's LoHa has no magnitude",
    "dokr": "PEFT's LoKr has no magnitude",
    "sparse": "PEFT's SHiRA keeps rows and columns whole: loratools reparameterize --to shira first",
}


def config_for(parts: Mapping[str, Part], before: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an adapter of one of them; UnsupportedInTargetError names a target that PEFT cannot make so.

    `before` is the config that the adapter had, where it is carried along: it tells what shapes do not.
    """
    kinds = {target: _kind_of(part) for target, part in parts.items()}
    first, kind = next(iter(kinds.items()))
    if other := next((target for target, found in kinds.items() if found != kind), None):
        raise UnsupportedInTargetError(
            f"{other} is a {kinds[other]} and {first} a {kind}, and an adapter of PEFT is of one method; pass --exact "
            "or --rank N to write a LoRA"
        )
    if kind == "shira":
        return _shira(parts, before)
    if kind in ("fourierft", "waveft"):
        return _spectra(parts, kind)
    return {
        "peft_type": WRITABLE[kind],
        **(_with_alpha(parts, kind) if kind in ("loha", "lokr") else _drawn(parts, kind)),
        "target_modules": target_modules(list(parts)),
        "init_weights": True,
        "modules_to_save": None,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }


def _shira(parts: Mapping[str, Part], before: Mapping[str, Any]) -> dict[str, Any]:
    ranks = {}
    for target, part in parts.items():
        if "shira_weight" not in part.slots:
            raise UnsupportedInTargetError(
                f"{target}: a file of PEFT is SHiRA throughout, or not at all; pass --rank N to write a LoRA"
            )
        if part.shape is None:  # as PEFT's own files are, whose config says it
            ranks[target] = before.get("r", 32)
            continue
        count, sides = part.shapes["shira_weight"][0], sum(part.shape)
        if len(part.shape) != 2 or count % sides:
            raise UnsupportedInTargetError(
                f"{target}: holds {count} entries of {part.shape}, and PEFT's SHiRA r (m + n) of a matrix; make it "
                "with loratools reparameterize --to shira --rank N"
            )
        ranks[target] = count // sides
    if len(set(ranks.values())) > 1:
        one, other = (next(t for t, r in ranks.items() if r == rank) for rank in sorted(set(ranks.values()))[:2])
        raise UnsupportedInTargetError(
            f"{one}: is of rank {ranks[one]} and {other} of {ranks[other]}, and PEFT's SHiRA has one for all; make it "
            "with loratools reparameterize --to shira --rank N"
        )
    return {
        "peft_type": WRITABLE["shira"],
        "r": next(iter(ranks.values())),
        "mask_type": "random",
        "random_seed": None,
        "target_modules": target_modules(list(parts)),
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }


def _spectra(parts: Mapping[str, Part], family: str) -> dict[str, Any]:
    """FourierFT and WaveFT, whose seed, wavelet and scaling are the same for all."""
    slot = f"{family}_spectrum"
    for target, part in parts.items():
        if slot not in part.slots or part.layout.embedding or len(part.shape or (0, 0)) != 2:
            raise UnsupportedInTargetError(
                f"{target}: a file of PEFT's {WRITABLE[family]} has matrices of that method alone; pass --rank N to "
                "write a LoRA"
            )
    one, first = next(iter(parts.items()))
    for target, part in parts.items():
        for what, theirs, ours in (
            ("scale", part.scale, first.scale),
            ("orientation", part.layout.transposed, first.layout.transposed),
            *((name, part.settings.get(name), value) for name, value in first.settings.items()),
        ):
            if theirs != ours:
                raise UnsupportedInTargetError(
                    f"{target}: its {what} is {theirs} and that of {one} {ours}, and PEFT's {WRITABLE[family]} has one "
                    "for all; pass --rank N to write a LoRA"
                )
    counts = {target: part.shapes[slot][0] for target, part in parts.items()}
    usual = Counter(counts.values()).most_common(1)[0][0]
    wavelet = first.settings.get("wavelet")
    if family == "waveft" and wavelet is not None and wavelet not in SOUND_WAVELETS:
        raise UnsupportedInTargetError(
            f"{one}: PEFT has no sound filters of the wavelet {wavelet!r}; make it with loratools reparameterize --to "
            "waveft --set wavelet=db1"
        )
    transform = {"wavelet_family": wavelet or "db1", "use_idwt": wavelet is not None} if family == "waveft" else {}
    return {
        "peft_type": WRITABLE[family],
        "n_frequency": usual,
        "n_frequency_pattern": {target: count for target, count in counts.items() if count != usual},
        "scaling": first.scale,
        "random_loc_seed": first.settings.get("seed", 777),
        **transform,
        "target_modules": target_modules(list(parts)),
        "fan_in_fan_out": first.layout.transposed,
        "bias": "none",
        "init_weights": True,
        "modules_to_save": None,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }


def counts_stated(config: Mapping[str, Any], parts: Mapping[str, Part]) -> bool:
    """Whether a config of FourierFT or WaveFT says, one by one, how many coefficients these targets have."""
    pattern = config.get("n_frequency_pattern") or {}
    usual = config.get("n_frequency", 1000 if config.get("peft_type") == "FOURIERFT" else 2592)
    if config.get("proportional_parameters") or not isinstance(pattern, dict):
        return False
    return all(
        part.shapes[slot][0] == pattern.get(_matching(pattern, target), usual)
        for target, part in parts.items()
        for slot in part.slots
    )


def _matching(pattern: Mapping[str, Any], target: str) -> str:
    """The first of PEFT's patterns that a target's name ends with, else the name itself."""
    return next((key for key in pattern if target.endswith(f".{key}")), target)


def _kind_of(part: Part) -> str:
    starts = {"hada_": "loha"} | {f"{kind}_": kind for kind in WRITABLE}
    return next(kind for start, kind in starts.items() if any(slot.startswith(start) for slot in part.slots))


def _with_alpha(parts: Mapping[str, Part], kind: str) -> dict[str, Any]:
    """PEFT's scale is alpha / r for LoHa and LoKr, and alpha is stated accordingly."""
    shape_fields, ranks = _loha(parts) if kind == "loha" else _lokr(parts)
    alphas = {target: _tidy(parts[target].scale * rank) for target, rank in ranks.items()}
    r, alpha = Counter((ranks[t], alphas[t]) for t in parts).most_common(1)[0][0]
    return {
        "r": r,
        "alpha": alpha,
        "rank_pattern": {t: rank for t, rank in ranks.items() if rank != r},
        "alpha_pattern": {t: a for t, a in alphas.items() if a != alpha},
        **shape_fields,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
    }


def _drawn(parts: Mapping[str, Part], kind: str) -> dict[str, Any]:
    """PEFT draws the projections again from a seed, as large as the largest of all targets."""
    first, one = next(iter(parts.items()))
    shapes = [part.shape for part in parts.values() if part.shape is not None and len(part.shape) == 2]
    largest = [max((m for m, _ in shapes), default=0), max((n for _, n in shapes), default=0)]
    for target, part in parts.items():
        if part.shape is None or len(part.shape) != 2:
            why = "it is no matrix of a known shape"
        elif "seed" not in part.settings or list(part.settings.get("largest") or []) != largest:
            why = "its projections are not drawn from a seed for just these targets"
        elif (part.settings, part.rank) != (one.settings, one.rank):
            why = f"its rank or seed is not that of {first}"
        elif not math.isclose(part.scale, one.scale if kind == "randlora" else 1.0, rel_tol=1e-6):
            why = f"its scale is {part.scale:g}"
        else:
            continue
        raise UnsupportedInTargetError(
            f"{target}: {why}, and PEFT draws once for all; pass --exact or --rank N to write a LoRA"
        )
    of_kind: dict[str, Any] = {"vera_dropout": 0.0, "d_initial": 0.1}
    if kind == "randlora":
        draw = one.settings.get("draw")
        of_kind = {
            "randlora_alpha": _tidy(one.scale * one.rank),
            "sparse": draw == "sparse",
            "very_sparse": draw == "very_sparse",
            "randlora_dropout": 0.0,
        }
    return {
        "r": one.rank,
        "projection_prng_key": one.settings["seed"],
        "save_projection": False,
        **of_kind,
        "fan_in_fan_out": False,
        "bias": "none",
    }


def _loha(parts: Mapping[str, Part]) -> tuple[dict[str, Any], dict[str, int]]:
    for target, part in parts.items():
        first, second = part.shapes["hada_w1_b"][0], part.shapes["hada_w2_b"][0]
        if first != second:
            raise UnsupportedInTargetError(
                f"{target}: its halves have ranks {first} and {second}, and PEFT's LoHa has one for both; pass --exact "
                "or --rank N to write a LoRA"
            )
    cores = any("hada_t1" in part.slots for part in parts.values())
    return {"use_effective_conv2d": cores}, {target: part.rank for target, part in parts.items()}


def _lokr(parts: Mapping[str, Part]) -> tuple[dict[str, Any], dict[str, int]]:
    cores = any("lokr_t2" in part.slots for part in parts.values())
    both = any("lokr_w1_a" in part.slots for part in parts.values())
    for factor in _decompose_factors(parts):
        if misfit := next((t for t, part in parts.items() if not _is_factored(part, factor)), None):
            continue
        break
    else:
        raise UnsupportedInTargetError(
            f"{misfit}: no decompose_factor of PEFT's LoKr splits all targets as these are; pass --rank N to write a "
            "LoRA"
        )
    fields = {"decompose_both": both, "decompose_factor": factor, "use_effective_conv2d": cores}
    return fields, {target: _lokr_rank(target, part, both) for target, part in parts.items()}


def _sides(part: Part) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of w1 and of w2, without the kernel."""
    shapes, shape = part.shapes, part.shape
    assert shape is not None  # LoKr tells it
    first = shapes["lokr_w1"][:2] if "lokr_w1" in shapes else (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    return (first[0], first[1]), (shape[0] // first[0], shape[1] // first[1])


def _decompose_factors(parts: Mapping[str, Part]) -> Iterator[int]:
    yield -1
    yield from sorted({side for part in parts.values() for matrix in _sides(part) for side in matrix if side > 0})


def _is_factored(part: Part, factor: int) -> bool:
    (rows, columns), (more_rows, more_columns) = _sides(part)
    # a file does not tell the kernel of a convolution whose w2 is a product: its taps count among the columns
    flat = "lokr_w2_b" in part.slots and "lokr_t2" not in part.slots
    inputs = [more_columns // taps for taps in (_TAPS if flat else (1,)) if more_columns % taps == 0]
    return _split(rows * more_rows, factor) == (rows, more_rows) and any(
        _split(columns * n, factor) == (columns, n) for n in inputs
    )


def _split(size: int, factor: int) -> tuple[int, int]:
    """How PEFT and LyCORIS split a dimension: at `factor` where it divides, else at the largest divisor up to it and to
    the square root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(d for d in range(max(limit, 1), 0, -1) if size % d == 0)
    return small, size // small


def _lokr_rank(target: str, part: Part, both: bool) -> int:
    """A rank for which PEFT makes factors whole where these are, and products of this rank where these are not."""
    halves = [max(matrix) / 2 for matrix in _sides(part)]  # from which rank on a factor is whole
    whole = [f"lokr_w{i}" in part.slots for i in (1, 2)]
    ranks = {part.shapes[f"lokr_w{i}_b"][0] for i in (1, 2) if not whole[i - 1]}
    asked = [h for h, w, counts in zip(halves, whole, (both, True), strict=True) if w and counts]
    least = max((math.ceil(h) for h in asked), default=1)
    rank = ranks.pop() if ranks else least
    fits = not ranks and rank >= least and all(w or rank < h for h, w in zip(halves, whole, strict=True))
    if not fits:
        raise UnsupportedInTargetError(
            f"{target}: PEFT's LoKr would decompose other factors at rank {rank}; pass --rank N to write a LoRA"
        )
    return rank


def _tidy(alpha: float) -> float | int:
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-14) else alpha
