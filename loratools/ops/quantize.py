"""Adapters in few bits: every method in one container, sizes counted to the last byte of the file."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from loratools.adapter import RECORD_KEY, entry_of
from loratools.errors import AdapterError, UsageError
from loratools.families.base import LowRankUpdate
from loratools.files import PackedTarget, Saved, check_writable, packed_place, write_packed
from loratools.formats.packing import packed, unpacked
from loratools.linalg.factored import factored, squared_distance
from loratools.linalg.inner import frobenius
from loratools.operators import LowRank, sum_of
from loratools.ops.coders import Banded, Plain, Scales, balanced, delta_come, loraquant, singular_pair
from loratools.ops.gridding import Components, components_of, dense_on_grid, on_grid, weighted_components_of
from loratools.ops.initial import AT_OTHER_RANKS, refuse_mutated
from loratools.ops.spectra import is_finite_update, known_delta, nonfinite_error
from loratools.ops.statistics import Statistics, weighed_targets
from loratools.ops.steps import StepSearch
from loratools.pipeline import ordered_map, worker_count
from loratools.quant.gauges import Gauge
from loratools.reports.quantize import QuantizeReport, TargetCoded
from loratools.storage.packed import Coded, Content, Raw

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.families.base import Update

Method = Literal["grid", "balanced", "rtn", "sign", "lloyd", "nf", "petl", "loraquant", "delta-come"]
_SMALL = 64  # numbers of a tensor below which codes would not pay for their scales
_NORMS = ("magnitude", "up_bias")


@dataclass(frozen=True)
class Quantize:
    """How to quantise.

    `bits`: to a number; for `grid` any number, which codes and scales take on average; `budget`: bytes of the file, for
    `grid`, instead. `group`, `scales` and `rounds`: as in `Plain`, where a method has groups and rounds. `gauge` and
    `sweeps`: of `balanced`. `energy`: of LoRAQuant, the share that its better codes hold. `allow_nonfinite` carries
    targets with NaN or infinity over unchanged. `weights`: statistics of the inputs, for `grid`, which then keeps what
    the outputs are made of.
    """

    method: Method = "grid"
    bits: float = 4
    budget: int | None = None
    group: int = 64
    scales: Scales = "group"
    rounds: int = 1
    gauge: Gauge = "hadamard"
    sweeps: int = 2
    energy: float = 0.8
    seed: int = 0
    allow_nonfinite: bool = False
    weights: Statistics | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.method != "grid":
            raise UsageError(f"a budget in bytes is met by --method grid; {self.method} takes --bits")
        if self.weights is not None and self.method != "grid":
            raise UsageError(f"statistics are for --method grid; {self.method} rounds all numbers alike")
        if not 0 < self.bits <= 16:
            raise UsageError(f"{self.bits:g} bits to a number: give more than 0, and 16 at most")
        if self.method not in ("grid", "delta-come"):
            if self.bits != int(self.bits):
                raise UsageError(f"{self.method} has whole bits, not {self.bits:g}; --method grid has any number")
            self._plain()

    def _plain(self) -> Plain:
        """The coder of single tensors that goes with the method."""
        bits, method = int(self.bits), self.method
        if method == "loraquant":
            return Plain("rtn", bits, "group", self.group)
        if method in ("grid", "balanced", "delta-come"):
            whole = next(b for b in (1, 2, 3, 4, 8) if b >= min(self.bits, 8))
            return Plain("rtn" if whole == 8 else "lloyd", whole, "group", self.group, self.rounds)
        return Plain(method, bits, self.scales, self.group, self.rounds)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Outcome:
    """What a report is made of: no tensors, for it outlives the target's own."""

    target: str
    coded: TargetCoded | None  # None: carried over
    reason: str
    squared_norm: float
    squared_error: float


_Result: TypeAlias = tuple[PackedTarget, _Outcome]
_Keep: TypeAlias = Callable[[PackedTarget], None]


def _forget(packed: PackedTarget) -> None:
    """For targets that go to a file, or are packed for their size alone."""


def quantize(adapter: Adapter, options: Quantize = Quantize()) -> tuple[Adapter, QuantizeReport]:
    """The adapter as it is once it has been packed and is read again, in memory, with what that costs.

    Sizes are those of the file that `quantize_file` would write. Raises AdapterError for NaN and infinity, UsageError
    where a budget holds nothing.
    """
    adapter.require_weights()
    changed = adapter.recorded("quantize", arguments(adapter, options))
    updates: dict[str, Update] = {}

    def keep(packed: PackedTarget) -> None:
        updates[packed.target] = packed.update

    _, report = _run(changed, options, None, keep=keep, force=False)
    return changed.with_updates(updates), report


def quantize_file(
    adapter: Adapter, path: str | os.PathLike[str], options: Quantize = Quantize(), *, force: bool = False
) -> tuple[Saved, QuantizeReport]:
    """As `quantize`, streamed to one packed file at `path`, which `load` reads like any other adapter."""
    adapter.require_weights()
    changed = adapter.recorded("quantize", arguments(adapter, options))
    check_writable(changed, Path(path))
    place = packed_place(Path(path), force=force)
    size, report = _run(changed, options, place, keep=_forget, force=force)
    return Saved(place, place, size, None), replace(report, output=str(place))


def arguments(adapter: Adapter, options: Quantize) -> dict[str, Any]:
    """The choices that shape the output, as the record states them, and the dtype that most numbers had."""
    shown = {name: getattr(options, name) for name in Quantize.__dataclass_fields__ if name != "weights"}
    if options.weights is not None:
        shown["tokens"] = options.weights.tokens
    told = {
        k: v for k, v in shown.items() if k in ("method", "tokens") or v != Quantize.__dataclass_fields__[k].default
    }
    return {**told, "dtype": _usual_dtype(adapter)}


def dtype_before(adapter: Adapter) -> Literal["f32", "f16", "bf16"]:
    """The dtype that most numbers of a packed adapter had before, as its record says; f32 where it does not."""
    try:
        stated = json.loads(adapter.metadata.get(RECORD_KEY, "{}"))["arguments"]["dtype"]
    except (ValueError, KeyError, TypeError):
        return "f32"
    known: dict[str, Literal["f32", "f16", "bf16"]] = {"F16": "f16", "BF16": "bf16"}
    return known.get(str(stated), "f32")


def _usual_dtype(adapter: Adapter) -> str:
    counts: Counter[str] = Counter()
    for entry in adapter.entries.values():
        for spec in entry.specs.values():
            counts[spec.dtype] += spec.numel
    return counts.most_common(1)[0][0] if counts else "F32"


def _numbers(adapter: Adapter) -> int:
    return sum(spec.numel for entry in adapter.entries.values() for spec in entry.specs.values())


def _run(
    adapter: Adapter, options: Quantize, path: Path | None, *, keep: _Keep, force: bool
) -> tuple[int, QuantizeReport]:
    refuse_mutated(adapter, AT_OTHER_RANKS)
    if options.weights is not None:
        weighed_targets(adapter)
    if options.method != "grid":
        return _written(adapter, options, 0.0, path, keep=keep, force=force)
    goal = options.budget or max(1, int(_numbers(adapter) * options.bits / 8))
    search = StepSearch.begun(adapter, goal, weights=options.weights, allow_nonfinite=options.allow_nonfinite)
    while (step := search.next_step()) is not None:
        size = write_packed(adapter, _packed(adapter, options, step, [], _forget), None)
        search.tried(step, size.file if options.budget else size.codes)
    return _written(adapter, options, search.best, path, keep=keep, force=force)


def _written(
    adapter: Adapter, options: Quantize, step: float, path: Path | None, *, keep: _Keep, force: bool
) -> tuple[int, QuantizeReport]:
    outcomes: list[_Outcome] = []
    size = write_packed(adapter, _packed(adapter, options, step, outcomes, keep), path, force=force)
    return size.file, _report(adapter, outcomes, size.file)


def _packed(
    adapter: Adapter, options: Quantize, step: float, outcomes: list[_Outcome], keep: _Keep
) -> Iterator[PackedTarget]:
    def work(target: str) -> _Result:
        return _one(adapter, target, options, step)

    for done, outcome in ordered_map(work, adapter.entries, workers=worker_count("cpu")):
        outcomes.append(outcome)
        keep(done)
        yield done


def _one(adapter: Adapter, target: str, options: Quantize, step: float) -> _Result:
    update = adapter[target]
    if not is_finite_update(update):
        if not options.allow_nonfinite:
            raise nonfinite_error(target)
        return _carried(adapter, target, update, "holds NaN or infinity")
    try:
        if options.method in ("grid", "balanced", "loraquant", "delta-come") and isinstance(update, LowRankUpdate):
            part = update.direction_operator()
            if isinstance(part, LowRank) and adapter.format.packing(target, "down") != "stacked":
                return _factored(adapter, target, update, part, options, step)
        if options.method == "grid":
            return _dense(adapter, target, update, step)
        return _by_tensor(adapter, target, update, options._plain())
    except ValueError as error:
        raise AdapterError(f"{target}: {error}") from error


def _carried(adapter: Adapter, target: str, update: Update, reason: str) -> _Result:
    contents = {slot: Raw(tensor) for slot, tensor in _stored(adapter, target, update).items()}
    return PackedTarget(target, update, contents), _Outcome(target, None, reason, 0.0, 0.0)


def _stored(adapter: Adapter, target: str, update: Update) -> dict[str, Tensor]:
    """The tensors of the update as the file has them, by slot."""
    packing, experts = adapter.format.packing, update.layout.experts
    return {
        slot: packed(tensor, slot, packing(target, slot), experts).contiguous()
        for slot, tensor in update.parameters().items()
    }


def _factored(
    adapter: Adapter, target: str, update: LowRankUpdate, part: LowRank, options: Quantize, step: float
) -> _Result:
    """A product of two factors in codes, in whichever pair suits the method."""
    rank = adapter.entries[target].rank
    scale = adapter.format.writable_scale(target, rank, update.scale, "fold")
    wide = LowRank(part.left.double(), part.right.double(), part.scale)
    if options.method == "grid":
        if options.weights is None:
            components = components_of(wide)
        else:
            moment = options.weights.moment_of(target, update)
            components = weighted_components_of(wide, moment, options.weights.channels(target))
        codes = on_grid(_over(components, scale), step / abs(scale or 1.0))
        label = "grid"
    else:
        pair = singular_pair(wide.left * (wide.scale / (scale or 1.0)), wide.right)
        coder, label = _banded(options, *pair)
        codes = coder.of_singular(*pair)
    up, down = codes[0].decode(), codes[1].decode()
    k = up.shape[1]
    if k != rank:  # what a dialect can say of a scale may depend on the rank
        kept = adapter.format.writable_scale(target, k, update.scale, "fold")
        if not math.isclose(kept, scale):
            raise AdapterError(
                f"{target}: the dialect {adapter.format.name} has no place for another rank; convert first"
            )
    new = update.with_direction(LowRank(up, down, scale), scale=scale)
    tensors = _stored(adapter, target, new)
    flipped = adapter.format.packing(target, "down") == "transposed"
    contents: dict[str, Content] = {slot: Raw(tensor) for slot, tensor in tensors.items() if slot not in ("up", "down")}
    for slot, coded in zip(("up", "down"), codes, strict=True):
        contents[slot] = Coded(tuple(tensors[slot].shape), coded.parts, coded.transposed != flipped)
    f = factored((wide.left * wide.scale)[None], wide.right[None])
    distance, norm = squared_distance(f, (up.double() * scale)[None], down.double()[None])
    return _outcome(target, rank, new, contents, label, float(norm), float(distance))


def _over(c: Components, scale: float) -> Components:
    """The components of the delta divided by the scale with which they are written."""
    by = scale or 1.0
    return replace(c, x=c.x / by, s=c.s / abs(by), y=c.y / abs(by))


def _banded(options: Quantize, up: Tensor, down: Tensor) -> tuple[Banded, str]:
    """The coder for a singular pair, and what to call its codes."""
    bits = math.ceil(options.bits)
    if options.method == "balanced":
        coder = balanced(
            bits,
            group=options.group,
            gauge=options.gauge,
            sweeps=options.sweeps,
            rounds=options.rounds,
            seed=options.seed,
        )
        return coder, f"{bits}-bit {options.gauge}"
    if options.method == "delta-come":
        return delta_come(up.shape[1], bits=options.bits), "8, 3 and 2 bits"
    values = (up.norm(dim=0) * down.norm(dim=1)).tolist()
    return loraquant(values, high_bits=bits, energy=options.energy), f"{bits} bits and signs"


def _dense(adapter: Adapter, target: str, update: Update, step: float) -> _Result:
    """A delta that is stored as it is goes on the grid; of other families nobody knows what an error would do."""
    tensors = _stored(adapter, target, update)
    if update.family != "full" or len(tensors) != 1:
        return _carried(adapter, target, update, f"{update.family}: only factors and full deltas go on a grid")
    (slot, tensor), *_ = tensors.items()
    if tensor.numel() < _SMALL or tensor.ndim < 2:
        return _carried(adapter, target, update, "is small")
    coded = dense_on_grid(tensor.flatten(1), step)
    return _of_tensors(adapter, target, update, {slot: replace(coded, shape=tuple(tensor.shape))}, "grid")


def _by_tensor(adapter: Adapter, target: str, update: Update, plain: Plain) -> _Result:
    contents: dict[str, Coded] = {}
    for slot, tensor in _stored(adapter, target, update).items():
        flipped = adapter.format.packing(target, slot) == "transposed"
        if tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() >= _SMALL and slot not in _NORMS:
            contents[slot] = plain.tensor(tensor, components_last=(slot == "up") != flipped)
    if not contents:
        return _carried(adapter, target, update, "has no tensor that is worth codes")
    return _of_tensors(adapter, target, update, contents, f"{plain.bits}-bit {plain.method}")


def _of_tensors(adapter: Adapter, target: str, update: Update, coded: Mapping[str, Coded], label: str) -> _Result:
    """The outcome of a target some of whose stored tensors are in codes."""
    contents: dict[str, Content] = {
        slot: coded.get(slot) or Raw(tensor) for slot, tensor in _stored(adapter, target, update).items()
    }
    packing = adapter.format.packing
    numbers = {slot: unpacked(content.decode(), slot, packing(target, slot)) for slot, content in coded.items()}
    entry, new = adapter.entries[target], update.with_tensors(numbers)
    try:
        before, after = known_delta(update), known_delta(new)
    except AdapterError:  # it needs the base
        return _outcome(target, entry.rank, new, contents, label, math.nan, math.nan)
    norm, distance = frobenius(before) ** 2, frobenius(sum_of([before, -after])) ** 2
    return _outcome(target, entry.rank, new, contents, label, norm, distance)


def _outcome(
    target: str, rank: int, new: Update, contents: Mapping[str, Content], label: str, norm: float, distance: float
) -> _Result:
    distance = max(distance, 0.0)
    error = None if math.isnan(norm) else math.sqrt(distance / norm) if norm else 0.0
    coded = TargetCoded(rank, entry_of(new).rank, error, label)
    return PackedTarget(target, new, contents), _Outcome(target, coded, "", norm, distance)


def _report(adapter: Adapter, outcomes: list[_Outcome], size: int) -> QuantizeReport:
    known = [o for o in outcomes if o.coded is not None and not math.isnan(o.squared_norm)]
    norm, error = math.fsum(o.squared_norm for o in known), math.fsum(o.squared_error for o in known)
    targets = {o.target: o.coded for o in outcomes if o.coded is not None}
    unchanged = dict(adapter.unsupported) | {o.target: o.reason for o in outcomes if o.coded is None}
    numbers, before = _numbers(adapter), adapter.file_nbytes
    total: dict[str, float | int | None] = {
        "targets": len(outcomes) + len(adapter.unsupported),
        "quantized": len(targets),
        "rank_before": max((c.rank_before for c in targets.values()), default=0),
        "rank_after": max((c.rank_after for c in targets.values()), default=0),
        "relative_error": math.sqrt(error / norm) if norm else 0.0,
        "bits_per_number": 8 * size / numbers if numbers else 0.0,
        "bytes_before": before,
        "bytes_after": size,
    }
    notes = [*adapter.warnings]
    if lost := [t for t, c in targets.items() if c.relative_error is not None and c.relative_error > 0.999]:
        notes.append(f"{len(lost)} of {len(targets)} deltas are gone; first: {lost[0]}; allow more bits")
    if targets and total["relative_error"] > 0.5:  # type: ignore[operator]
        notes.append(
            f"the relative error is {total['relative_error']:.2f}: more than half of the delta's norm is lost; "
            "allow more bits, or train through the rounding"
        )
    if size > before:
        notes.append(f"the output is larger than the input: {size:,} bytes against {before:,}")
    return QuantizeReport(targets, unchanged, total, tuple(notes))
