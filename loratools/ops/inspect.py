"""Look at an adapter: spectra, norms and ranks of its targets, its size, and whether its components are ordered."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.linalg import norms
from loratools.linalg.inner import frobenius
from loratools.ops.nested import compare_prefixes
from loratools.ops.spectra import measure
from loratools.pipeline import ordered_map, worker_count
from loratools.reports.inspect import (
    Bytes,
    Footprint,
    Group,
    InspectReport,
    Part,
    TargetNumbers,
    doubling,
    group,
)

if TYPE_CHECKING:
    from loratools.adapter import Adapter, Entry
    from loratools.base_weights import BaseWeights
    from loratools.ops.spectra import Measured

ENERGY = 0.95  # the share that "compressible" keeps
_NOISE = 1e-7  # singular values below this share of the largest are rounding
LISTED = 5  # targets named as the most and the least compressible

# Words that kohya and LyCORIS join to the module's name with an underscore where the model has a dot.
_PARENT = re.compile(
    r"(?:.*_)?(?:(?:self_|cross_|img_|txt_|token_refiner_)?(?:attn\d*|attention|mlp|mod)|ff(?:_context)?|transformer|modulation)_(?=\w)"
)


def inspect(
    adapter: Adapter,
    *,
    target: str | None = None,
    base: BaseWeights | None = None,
    nested: bool = False,
    device: str = "cpu",
    allow_nonfinite: bool = False,
) -> InspectReport:
    """Measure the targets that match `target` (all, by default) without changing anything.

    `base` adds norms relative to the base weights; `nested` compares the first components with the best ones. Raises
    AdapterError naming a target with NaN or infinity, unless `allow_nonfinite` lists it as unmeasured.
    """
    adapter.require_weights()
    chosen = list(adapter.entries) if target is None else list(adapter.select(target))
    unmeasured = dict(adapter.unsupported) if target is None else {}
    if base is None:
        unmeasured |= {t: reason for t in chosen if (reason := blind(adapter.entries[t])) is not None}
        chosen = [t for t in chosen if t not in unmeasured]
    spectra: dict[str, Measured] = {}
    for measured in measure(
        adapter, chosen, base=base, device=device, allow_nonfinite=allow_nonfinite, directions=True
    ):
        if measured.blocks:
            spectra[measured.target] = measured
        else:
            unmeasured[measured.target] = "holds NaN or infinity"
    chosen = [t for t in chosen if t in spectra]
    where = places(list(adapter.entries))

    def numbers(target: str) -> TargetNumbers:
        return target_numbers(adapter, spectra[target], where[target], base=base)

    targets = dict(zip(chosen, ordered_map(numbers, chosen, workers=worker_count(device)), strict=True))
    layers, modules = _grouped(targets, by_layer=True), _grouped(targets, by_layer=False)
    ordered = sorted((t for t in targets if targets[t].spectral_norm > 0), key=lambda t: _compressibility(targets[t]))
    origin = adapter.origin
    return InspectReport(
        path=str(origin.path) if origin else None,
        container=origin.container if origin else None,
        format=adapter.format.name,
        families=dict(Counter(e.family.family for e in adapter.entries.values())),
        keys=_keys(adapter),
        targets=targets,
        unmeasured=unmeasured,
        total=group(targets.values()),
        layers=layers,
        modules=modules,
        most_compressible=tuple(ordered[:LISTED]),
        least_compressible=tuple(ordered[: -LISTED - 1 : -1]),
        footprint=footprint(adapter, base),
        nested=compare_prefixes(adapter, {t: spectra[t].blocks for t in chosen}, device=device) if nested else None,
        warnings=(*adapter.warnings, *_warnings(adapter, targets, unmeasured)),
    )


@dataclass(frozen=True)
class _Against:
    """A target beside its base parameter."""

    delta_norm: float | None  # Frobenius, where the spectrum is not the delta's
    base_norm: float
    shape: tuple[int, ...]


def blind(entry: Entry) -> str | None:
    """Why nothing of a target can be measured without the base, where that is so."""
    if not entry.needs_base or entry.is_factored:
        return None
    return f"{entry.family.family} depends on the base weight; pass --base"


def target_numbers(
    adapter: Adapter, measured: Measured, place: tuple[str, str], *, base: BaseWeights | None = None
) -> TargetNumbers:
    """All numbers of one measured target; AdapterError where `base` lacks its parameter."""
    entry = adapter.entries[measured.target]
    if base is None:
        return _numbers(entry, measured, place, None)
    weight = base.find(adapter.format.parameter(measured.target), entry.base_shape)
    partial = entry.needs_base and entry.is_factored
    delta = frobenius(entry.read().operator(weight)) if partial else None
    return _numbers(entry, measured, place, _Against(delta, float(weight.double().norm()), tuple(weight.shape)))


def _numbers(entry: Entry, measured: Measured, place: tuple[str, str], against: _Against | None) -> TargetNumbers:
    spectrum = measured.values
    shape = entry.base_shape or (against.shape if against else ())
    rank = entry.rank if entry.is_factored else sum(s > _NOISE * spectrum[0] for s in spectrum) or 1
    step = entry.rank_step
    # One value for each step of the rank: what all blocks together gain by it.
    steps = [math.hypot(*column) for column in zip(*measured.blocks, strict=True)]
    norm, of = norms.frobenius_norm(spectrum), _part(entry, against is not None)
    relative = None
    if against is not None:
        norm = norm if against.delta_norm is None else against.delta_norm
        relative = norm / against.base_norm if against.base_norm else None
    return TargetNumbers(
        family=entry.family.family,
        of=of,
        layer=place[0],
        module=place[1],
        shape=shape,
        rank=rank,
        scale=entry.scale,
        blocks=len(measured.blocks),
        parameters=sum(spec.numel for spec in entry.specs.values()),
        bytes=entry.nbytes,
        dtypes={slot: spec.dtype for slot, spec in entry.specs.items()},
        norm=norm,
        relative_norm=relative,
        spectral_norm=norms.spectral_norm(spectrum),
        nuclear_norm=norms.nuclear_norm(spectrum),
        effective_rank=_mean([norms.effective_rank(block) for block in measured.blocks]) * step,
        stable_rank=_mean([norms.stable_rank(block) for block in measured.blocks]) * step,
        energy={k: norms.energy(steps, k // step) for k in doubling(rank, step)},
        compressible_rank_95=_least_rank(steps) * step,
        spectrum=spectrum,
    )


def _part(entry: Entry, has_base: bool) -> Part:
    if not entry.needs_base or not entry.is_factored:
        return "delta"
    return "low-rank part" if has_base else "direction"


def _least_rank(spectrum: Sequence[float]) -> int:
    """The least rank that keeps `ENERGY`; 0 for a zero spectrum."""
    if not norms.spectral_norm(spectrum):
        return 0
    return next(k for k in range(1, len(spectrum) + 1) if norms.energy(spectrum, k) >= ENERGY)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _compressibility(numbers: TargetNumbers) -> tuple[float, float]:
    return numbers.compressible_rank_95 / numbers.rank, numbers.effective_rank / numbers.rank


def _grouped(targets: Mapping[str, TargetNumbers], *, by_layer: bool) -> dict[str, Group]:
    members: dict[str, list[TargetNumbers]] = {}
    for numbers in targets.values():
        members.setdefault(numbers.layer if by_layer else numbers.module, []).append(numbers)
    return {name: group(members[name]) for name in (sorted(members, key=depth) if by_layer else members)}


def depth(layer: str) -> tuple[str, int]:
    """A key that puts layers in the order of their numbers, and what is in no layer last."""
    stage, _, number = layer.rpartition(".")
    return (stage, int(number)) if number.isdecimal() else ("\U0010ffff", 0)


def places(targets: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Layer and module of each target: "7" and "q_proj" for "model.layers.7.self_attn.q_proj".

    A layer is the path to the first number that has something after it, less what all targets have in common; "other"
    where there is none. A module is the last component, with the one before it where it is a number.
    """
    parts = {t: components(t) for t in targets}
    paths: dict[str, list[str]] = {}
    for target, path in parts.items():
        numbers = [i for i, word in enumerate(path[:-1]) if word.isdecimal()]
        if numbers:
            paths[target] = path[: numbers[0] + 1]
    stages = {tuple(path[:-1]) for path in paths.values()}
    common = next(iter(stages), ())
    for stage in stages:
        equal = [a == b for a, b in zip(common, stage, strict=False)]
        common = common[: equal.index(False) if False in equal else len(equal)]
    layers = {t: ".".join(path[len(common) :]) for t, path in paths.items()}
    modules = {t: ".".join(path[-2 if path[-1].isdecimal() else -1 :]) for t, path in parts.items()}
    return {t: (layers.get(t, "other"), modules[t]) for t in targets}


def components(target: str) -> list[str]:
    """The dotted path of a target; a flattened one is taken apart at its numbers and before its last word."""
    if "." in target or not re.match(r"(?:lora|lycoris)_", target):
        return target.split(".")
    words = re.split(r"_(\d+)(?=_|$)", target.partition("_")[2])
    path = [word for piece in words if (word := piece.strip("_"))]
    last = max((i for i, word in enumerate(path) if not word.isdecimal()), default=0)
    path[last:] = [*_split_parent(path[last]), *path[last + 1 :]]
    return path


def _split_parent(name: str) -> list[str]:
    match = _PARENT.match(name)
    return [match.group().rstrip("_"), name[match.end() :]] if match else [name]


def _keys(adapter: Adapter) -> dict[str, int]:
    updates = sum(len(entry.specs) for entry in adapter.entries.values())
    scales = sum(adapter.format.scale_key(target) is not None for target in adapter.entries)
    return {"updates": updates, "scales": scales, "extras": len(adapter.extras)}


def footprint(adapter: Adapter, base: BaseWeights | None = None) -> Footprint:
    """What the adapter takes on disk and in memory, alone and with its base; needs no tensor data."""
    replaced = [adapter.extras[key].spec for key in adapter.format.replacements() if key in adapter.extras]
    trained = [spec for entry in adapter.entries.values() for spec in entry.specs.values()] + replaced
    parameters, stored = sum(spec.numel for spec in trained), sum(spec.nbytes for spec in trained)
    every_extra = sum(extra.spec.numel for extra in adapter.extras.values())
    base_specs = list(base.source.specs.values()) if base else []
    base_bytes = sum(spec.nbytes for spec in base_specs)
    return Footprint(
        trainable_parameters=parameters,
        other_parameters=every_extra - sum(spec.numel for spec in replaced),
        adapter=Bytes(adapter.nbytes),
        file=Bytes(adapter.origin.nbytes) if adapter.origin else None,
        gradients=Bytes(stored),
        adam_state=Bytes(2 * 4 * parameters),
        base_parameters=sum(spec.numel for spec in base_specs) if base else None,
        base=Bytes(base_bytes) if base else None,
        adapter_and_base=Bytes(base_bytes + adapter.nbytes) if base else None,
    )


def _warnings(adapter: Adapter, targets: Mapping[str, TargetNumbers], unmeasured: Mapping[str, str]) -> Iterator[str]:
    if found := sorted({t.family for t in targets.values() if t.of == "direction"}):
        yield (
            f"{', '.join(found)}: spectrum of the direction scale * up @ down, before its magnitude; "
            "pass --base for the delta's norm and the spectrum of its low-rank part"
        )
    if found := sorted({t.family for t in targets.values() if t.of == "low-rank part"}):
        yield f"{', '.join(found)}: norm of the whole delta, spectrum of its low-rank part"
    if bad := [t for t, reason in unmeasured.items() if t in adapter.entries and "NaN" in reason]:
        first = ", ".join(bad[:3]) + ", ..." * (len(bad) > 3)
        yield f"{len(bad)} targets hold NaN or infinity and were left out: {first}"
    if zero := [t for t, numbers in targets.items() if numbers.spectral_norm == 0]:
        yield f"{len(zero)} targets are zero updates, as before training; first: {zero[0]}"
    if left := {t: reason for t, reason in unmeasured.items() if "NaN" not in reason}:
        first, reason = next(iter(left.items()))
        yield f"{len(left)} targets could not be measured; first: {first}: {reason}"
