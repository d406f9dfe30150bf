"""Adapters in few bits: every method in one container, sizes counted to the last byte of the file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from loratools.adapter import RECORD_KEY, entry_of
from loratools.errors import AdapterError, UsageError
from loratools.families.base import LowRankUpdate
from loratools.files import PackedTarget, Saved, check_writable, packed_place, write_packed
from loratools.formats.packing import packed, unpacked
from loratools.linalg.factored import factored, squared_distance
from loratools.linalg.inner import frobenius
from loratools.operators import LowRank, sum_of
from loratools.ops.coders import Banded, Plain, Scales, balanced, delta_come, loraquant, singular_pair
from loratools.ops.components import ComponentStore, grid_part
from loratools.ops.gridding import already_on_grid, dense_on_grid, multiplied, on_grid
from loratools.ops.initial import AT_OTHER_RANKS, refuse_mutated
from loratools.ops.spectra import is_finite_update, known_delta, nonfinite_error
from loratools.ops.statistics import Statistics, weighed_targets
from loratools.ops.steps import StepSearch
from loratools.ops.weighing import weighed_squares
from loratools.pipeline import ordered_map, worker_count
from loratools.quant.bits import WIDTHS
from loratools.quant.gauges import Gauge
from loratools.reports.quantize import QuantizeReport, TargetCoded
from loratools.storage.packed import Coded, Content, Raw

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.families.base import Update

Dtype = Literal["f32", "f16", "bf16"]
Method = Literal["grid", "exact", "balanced", "rtn", "sign", "lloyd", "nf", "petl", "loraquant", "delta-come"]
_SMALL = 64  # numbers of a tensor below which codes would not pay for their scales
_NORMS = ("magnitude", "up_bias")


@dataclass(frozen=True)
class Quantize:
    """How to quantise.

    `method`: `exact` takes factors that lie on a grid already, as training through one leaves them, and loses nothing.
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
    gauge: Gauge = "learned"
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
        if self.budget is not None and self.budget < 1:
            raise UsageError(f"a budget of {self.budget} bytes holds nothing; give at least 1")
        if not 0 < self.energy <= 1:
            raise UsageError(f"an energy of {self.energy:g} is no share; give more than 0, and 1 at most")
        if self.sweeps < 0:
            raise UsageError(f"{self.sweeps} sweeps: give 0 or more")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"the seed {self.seed}: give 0 or more, and less than 2^63")
        if not 0 < self.bits <= 16:
            raise UsageError(f"{self.bits:g} bits to a number: give more than 0, and 16 at most")
        if self.method not in ("grid", "exact", "delta-come"):
            if self.bits != int(self.bits):
                raise UsageError(f"{self.method} has whole bits, not {self.bits:g}; --method grid has any number")
            if self.method == "balanced" and self.bits not in WIDTHS:
                raise UsageError(f"balanced has {', '.join(map(str, WIDTHS))} bits, not {self.bits:g}")
            self._plain()

    def _plain(self) -> Plain:
        """The coder of single tensors that goes with the method."""
        bits, method = int(self.bits), self.method
        if method == "loraquant":
            return Plain("rtn", bits, "group", self.group)
        if method in ("grid", "balanced", "delta-come"):
            whole = next(b for b in WIDTHS if b >= min(self.bits, 8))
            return Plain("rtn" if whole == 8 else "lloyd", whole, "group", self.group, self.rounds)
        return Plain(method, bits, self.scales, self.group, self.rounds)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Outcome:
    """What a report is made of: no tensors, for it outlives the target's own."""

    target: str
    coded: TargetCoded | None  # None: carried over
    reason: str
    squared_norm: float  # NaN where it is not known
    squared_error: float


@dataclass(frozen=True)
class _Grid:
    """A pass at one step; a trial is for the size alone, and decodes nothing."""

    step: float
    components: ComponentStore
    trial: bool = False


_Result: TypeAlias = tuple[PackedTarget, _Outcome]
_Keep: TypeAlias = Callable[[PackedTarget], None]


def _forget(packed: PackedTarget) -> None:
    """For targets that go to a file, or are packed for their size alone."""


@dataclass(frozen=True, eq=False)
class _Weighing:
    """Sums what the inputs see of the errors, target by target as they are kept; nothing without statistics."""

    adapter: Adapter
    weights: Statistics | None
    squares: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, packed: PackedTarget) -> None:
        if self.weights is None or packed.target not in self.weights.moments:
            return
        before = self.adapter[packed.target]
        if is_finite_update(before):
            self.squares.append(weighed_squares(packed.target, before, packed.update, self.weights))

    def told(self, report: QuantizeReport) -> QuantizeReport:
        """The report with the weighted error of all targets that the statistics know."""
        error: float | None = None
        if self.weights is not None:
            distance, norm = (math.fsum(column) for column in zip((0.0, 0.0), *self.squares, strict=True))
            error = math.sqrt(distance / norm) if norm else 0.0
        return replace(report, total={**report.total, "weighted_error": error})


def quantize(adapter: Adapter, options: Quantize = Quantize()) -> tuple[Adapter, QuantizeReport]:
    """The adapter as it is once it has been packed and is read again, in memory, with what that costs.

    Sizes are those of the file that `quantize_file` would write. Raises AdapterError for NaN and infinity, UsageError
    where a budget holds nothing.
    """
    adapter.require_weights()
    changed = adapter.recorded("quantize", arguments(adapter, options))
    updates: dict[str, Update] = {}
    weighing = _Weighing(adapter, options.weights)

    def keep(packed: PackedTarget) -> None:
        updates[packed.target] = packed.update
        weighing(packed)

    _, report = _run(changed, options, None, keep=keep, force=False)
    return changed.with_updates(updates), weighing.told(report)


def quantize_file(
    adapter: Adapter, path: str | os.PathLike[str], options: Quantize = Quantize(), *, force: bool = False
) -> tuple[Saved, QuantizeReport]:
    """As `quantize`, streamed to one packed file at `path`, which `load` reads like any other adapter."""
    adapter.require_weights()
    changed = adapter.recorded("quantize", arguments(adapter, options))
    check_writable(changed, Path(path))
    place = packed_place(Path(path), force=force)
    weighing = _Weighing(adapter, options.weights)
    size, report = _run(changed, options, place, keep=weighing, force=force)
    return Saved(place, place, size, None), replace(weighing.told(report), output=str(place))


def arguments(adapter: Adapter, options: Quantize) -> dict[str, Any]:
    """The choices that shape the output, as the record states them, and the dtype that most numbers had."""
    shown = {name: getattr(options, name) for name in Quantize.__dataclass_fields__ if name != "weights"}
    if options.weights is not None:
        shown["tokens"] = options.weights.tokens
    told = {
        k: v for k, v in shown.items() if k in ("method", "tokens") or v != Quantize.__dataclass_fields__[k].default
    }
    return {**told, "dtype": adapter.usual_dtype}


def recorded_arguments(adapter: Adapter) -> Mapping[str, Any]:
    """The choices that made a file, as its record states them; none where it has no record."""
    try:
        found = json.loads(adapter.metadata.get(RECORD_KEY, "{}"))["arguments"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, Mapping) else {}


def dtype_before(adapter: Adapter) -> Dtype:
    """The dtype that most numbers of a packed adapter had before, as its record says; f32 where it does not."""
    return dtype_named(str(recorded_arguments(adapter).get("dtype")))


def dtype_named(usual: str) -> Dtype:
    """What `convert` calls an adapter's usual dtype; f32 for all that it does not write."""
    known: dict[str, Dtype] = {"F16": "f16", "BF16": "bf16"}
    return known.get(usual, "f32")


def _numbers(adapter: Adapter) -> int:
    return sum(spec.numel for entry in adapter.entries.values() for spec in entry.specs.values())


def _run(
    adapter: Adapter, options: Quantize, path: Path | None, *, keep: _Keep, force: bool
) -> tuple[int, QuantizeReport]:
    refuse_mutated(adapter, AT_OTHER_RANKS)
    if options.weights is not None:
        weighed_targets(adapter)
    if options.method != "grid":
        return _written(adapter, options, None, path, keep=keep, force=force)
    if options.budget is not None:
        goal, asked = options.budget, f"a budget of {options.budget} bytes"
    else:
        goal = max(1, int(_numbers(adapter) * options.bits / 8))
        asked = f"a size of {options.bits:g} bits to a number, {goal} bytes of codes,"
    store = ComponentStore(adapter, options.weights)
    search = StepSearch.begun(goal, store.spreads(), sum(e.is_factored for e in adapter.entries.values()), asked)
    while (step := search.next_step()) is not None:
        size = write_packed(adapter, _packed(adapter, options, _Grid(step, store, trial=True), [], _forget), None)
        search.tried(step, *((size.file, size.file - size.codes) if options.budget is not None else (size.codes, 0)))
    return _written(adapter, options, _Grid(search.best, store), path, keep=keep, force=force)


def _written(
    adapter: Adapter, options: Quantize, grid: _Grid | None, path: Path | None, *, keep: _Keep, force: bool
) -> tuple[int, QuantizeReport]:
    outcomes: list[_Outcome] = []
    size = write_packed(adapter, _packed(adapter, options, grid, outcomes, keep), path, force=force)
    return size.file, _report(adapter, outcomes, size.file)


def _packed(
    adapter: Adapter, options: Quantize, grid: _Grid | None, outcomes: list[_Outcome], keep: _Keep
) -> Iterator[PackedTarget]:
    def work(target: str) -> _Result:
        return _one(adapter, target, options, grid)

    for done, outcome in ordered_map(work, adapter.entries, workers=worker_count("cpu")):
        outcomes.append(outcome)
        keep(done)
        yield done


def _one(adapter: Adapter, target: str, options: Quantize, grid: _Grid | None) -> _Result:
    update = adapter[target]
    if not is_finite_update(update):
        if not options.allow_nonfinite:
            raise nonfinite_error(target)
        return _carried(adapter, target, update, "holds NaN or infinity", math.nan)
    try:
        if options.method in ("grid", "balanced", "loraquant", "delta-come"):
            part = grid_part(adapter, target, update)
            if part is not None:
                assert isinstance(update, LowRankUpdate)  # it has a part
                return _factored(adapter, target, update, part, options, grid)
        if grid is not None:
            return _dense(adapter, target, update, grid)
        if options.method == "exact":
            return _by_tensor(adapter, target, update, _exact, "grid, exact")
        plain = options._plain()
        return _by_tensor(adapter, target, update, plain.tensor, f"{plain.bits}-bit {plain.method}")
    except ValueError as error:
        raise AdapterError(f"{target}: {error}") from error


def _carried(adapter: Adapter, target: str, update: Update, reason: str, norm: float) -> _Result:
    contents = {slot: Raw(tensor) for slot, tensor in _stored(adapter, target, update).items()}
    return PackedTarget(target, update, contents), _Outcome(target, None, reason, norm, 0.0)


def _squared_norm(update: Update) -> float:
    """||delta||^2, NaN where it needs the base."""
    try:
        return frobenius(known_delta(update)) ** 2
    except AdapterError:
        return math.nan


def _stored(adapter: Adapter, target: str, update: Update) -> dict[str, Tensor]:
    """The tensors of the update as the file has them, by slot."""
    packing, experts = adapter.format.packing, update.layout.experts
    return {
        slot: packed(tensor, slot, packing(target, slot), experts).contiguous()
        for slot, tensor in update.parameters().items()
    }


def _factored(
    adapter: Adapter, target: str, update: LowRankUpdate, part: LowRank, options: Quantize, grid: _Grid | None
) -> _Result:
    """A product of two factors in codes, in whichever pair suits the method."""
    rank = adapter.entries[target].rank
    left, right = part.left.double() * part.scale, part.right.double()
    trial = grid is not None and grid.trial
    if grid is not None:
        before, components = grid.components.scale(target, update), grid.components.of(target, update, part)
        rows = rank if adapter.format.uniform else 1
        codes = on_grid(components, grid.step / abs(before or 1.0), rows, trial=trial)
        label = "grid"
        scale = adapter.format.writable_scale(target, codes[0].shape[1], update.scale, "fold")
        if before != scale:  # what a dialect can say of a scale may depend on the rank
            codes = codes[0], multiplied(codes[1], before / scale)
    else:
        scale = adapter.format.writable_scale(target, min(left.shape[0], *right.shape), update.scale, "fold")
        pair = singular_pair(left / (scale or 1.0), right)
        coder, label = _banded(options, *pair)
        codes = coder.of_singular(*pair)
    up, down = (part.left.new_zeros(c.shape) if trial else c.decode() for c in codes)
    new = update.with_direction(LowRank(up, down, scale), scale=scale)
    tensors = _stored(adapter, target, new)
    contents: dict[str, Content] = {slot: Raw(tensor) for slot, tensor in tensors.items() if slot not in ("up", "down")}
    for slot, coded in zip(("up", "down"), codes, strict=True):
        flipped = adapter.format.packing(target, slot) == "transposed"
        contents[slot] = Coded(tuple(tensors[slot].shape), coded.parts, coded.transposed != flipped)
    if trial:
        return _outcome(target, rank, new, contents, label, 0.0, 0.0)
    f = factored(left[None], right[None])
    distance, norm = squared_distance(f, (up.double() * scale)[None], down.double()[None])
    return _outcome(target, rank, new, contents, label, float(norm), float(distance))


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


def _dense(adapter: Adapter, target: str, update: Update, grid: _Grid) -> _Result:
    """A delta that is stored as it is goes on the grid; of other families nobody knows what an error would do."""
    tensors = _stored(adapter, target, update)
    if update.family != "full" or len(tensors) != 1:
        norm = 0.0 if grid.trial else _squared_norm(update)
        return _carried(adapter, target, update, f"{update.family}: only factors and full deltas go on a grid", norm)
    (slot, tensor), *_ = tensors.items()
    if tensor.numel() < _SMALL or tensor.ndim < 2:
        return _carried(adapter, target, update, "is small", _squared_norm(update))
    coded = replace(dense_on_grid(tensor.flatten(1), grid.step), shape=tuple(tensor.shape))
    if grid.trial:
        return _outcome(target, adapter.entries[target].rank, update, {slot: coded}, "grid", 0.0, 0.0)
    return _of_tensors(adapter, target, update, {slot: coded}, "grid")


class _Coder(Protocol):
    def __call__(self, tensor: Tensor, *, components_last: bool) -> Coded: ...


def _exact(tensor: Tensor, *, components_last: bool) -> Coded:
    try:
        return already_on_grid(tensor, components_last=components_last)
    except ValueError as error:
        raise ValueError(
            f"a factor lies on no grid ({error}); --method exact is for what was trained through one, and saved in "
            "float32"
        ) from error


def _by_tensor(adapter: Adapter, target: str, update: Update, code: _Coder, label: str) -> _Result:
    contents: dict[str, Coded] = {}
    for slot, tensor in _stored(adapter, target, update).items():
        flipped = adapter.format.packing(target, slot) == "transposed"
        if tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() >= _SMALL and slot not in _NORMS:
            contents[slot] = code(tensor, components_last=(slot == "up") != flipped)
    if not contents:
        return _carried(adapter, target, update, "has no tensor that is worth codes", _squared_norm(update))
    return _of_tensors(adapter, target, update, contents, label)


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
    known = [o for o in outcomes if not math.isnan(o.squared_norm)]
    norm, error = math.fsum(o.squared_norm for o in known), math.fsum(o.squared_error for o in known)
    targets = {o.target: o.coded for o in outcomes if o.coded is not None}
    unchanged = dict(adapter.unsupported) | {o.target: o.reason for o in outcomes if o.coded is None}
    numbers, before = _numbers(adapter), adapter.file_nbytes
    nothing_known = bool(targets) and all(coded.relative_error is None for coded in targets.values())
    lost_share = None if nothing_known else math.sqrt(error / norm) if norm else 0.0
    total: dict[str, float | int | None] = {
        "targets": len(outcomes) + len(adapter.unsupported),
        "quantized": len(targets),
        "rank_before": max((c.rank_before for c in targets.values()), default=0),
        "rank_after": max((c.rank_after for c in targets.values()), default=0),
        "relative_error": lost_share,
        "bits_per_number": 8 * size / numbers if numbers else 0.0,
        "bytes_before": before,
        "bytes_after": size,
    }
    notes = [*adapter.warnings]
    if lost := [t for t, c in targets.items() if c.relative_error is not None and c.relative_error > 0.999]:
        notes.append(f"{len(lost)} of {len(targets)} deltas are gone; first: {lost[0]}; allow more bits")
    if targets and lost_share is not None and lost_share > 0.5:
        notes.append(
            f"the relative error is {lost_share:.2f}: more than half of the delta's norm is lost; "
            "allow more bits, or train through the rounding"
        )
    if size > before:
        notes.append(f"the output is larger than the input: {size:,} bytes against {before:,}")
    return QuantizeReport(targets, unchanged, total, tuple(notes))
