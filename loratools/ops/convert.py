"""From one dialect to another: place every target in its model, arrange the modules anew, and rewrite what must be."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loratools.adapter import Adapter, Entry, Extra, entry_of
from loratools.errors import AdapterError, UnsupportedInTargetError, UsageError
from loratools.families import LoRA
from loratools.families.regroup import STORED, padded, recast, rescaled
from loratools.files import Saved, write
from loratools.formats import Format, Order, Part, writable_formats
from loratools.formats.layouts import Model, model_of, whisper
from loratools.formats.modules import Placement
from loratools.ops.carried import carried_by, metadata_for
from loratools.ops.initial import refuse_mutated
from loratools.ops.lowering import Lowered, Lowering, lowered
from loratools.ops.placing import model_named, module_shape, modules_of, without_biases
from loratools.ops.regroup import Job, jobs_for, made
from loratools.pipeline import ordered_map, worker_count
from loratools.reports.convert import ConvertedTarget, ConvertReport
from loratools.storage.base import TensorSpec

if TYPE_CHECKING:
    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update

Dtype = Literal["f32", "f16", "bf16", "q8_0"]
_SAME = 1e-6  # scales that differ by less were one number before a dialect rounded its alpha to float32
_FOLDED = "{} multiplied into the up factors, which rounds them once unless the quotient is a power of two"
DROPPABLE = ("bias", "extras", "unsupported", "unmapped")


@dataclass(frozen=True)
class Convert:
    """How to convert, beside the dialect.

    `lowering` says what to do with families that the dialect has no place for. `portable`: one rank for all targets,
    by zero padding, scale 1 and no patterns. `fold_alpha` writes scale 1 everywhere, `metadata` False nothing but
    tensors. `dtype`: of the factors, their own by default; q8_0 is for GGUF alone. `drop` names kinds of content
    (`DROPPABLE`) that may be left out. `model` and `component` state what names do not tell.
    """

    lowering: Lowering = field(default_factory=Lowering)
    portable: bool = False
    fold_alpha: bool = False
    metadata: bool = True
    drop: frozenset[str] = frozenset()
    model: Model | None = None
    component: str | None = None
    base: BaseWeights | None = None
    dtype: Dtype | None = None


@dataclass
class _Notes:
    """What happened, in the order in which it did."""

    notices: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def _destination(adapter: Adapter, to: str, options: Convert) -> type[Format]:
    """The kind of file that holds all families as they are, or else the first, unless these are to be lowered."""
    first, *others = writable_formats()[to]
    families = {entry.family.family for entry in adapter.entries.values()}
    fits = [kind for kind in others if families and families <= kind.holds]
    as_it_is = not options.portable and options.lowering == Lowering(seed=options.lowering.seed)
    return fits[0] if fits and as_it_is else first


def convert(adapter: Adapter, to: str, options: Convert = Convert()) -> tuple[Adapter, ConvertReport]:
    """The same updates in the dialect `to`, lazily: targets are rewritten when they are read.

    Alpha keeps its value wherever the dialect has a place for it; rows of fused projections are taken apart and joined
    exactly. Raises UnmappedModuleError, UnsupportedInTargetError and their kin, naming the targets, for what the
    dialect cannot hold and `drop` does not name.
    """
    formats = writable_formats()
    if to not in formats:
        raise UsageError(f"cannot write {to!r}; the dialects that can be written are {', '.join(formats)}")
    if adapter.format.bottlenecks:  # of others, what there is no place for is told below
        adapter.require_weights()
    refuse_mutated(adapter, "another file cannot say which base weight that leaves")
    if _stays(adapter, to, options):
        return _without_copies(adapter, options)
    destination = _destination(adapter, to, options)
    if options.dtype == "q8_0" and destination.container != "gguf":
        raise UsageError(f"q8_0 is for GGUF files; {to} holds f32, f16 and bf16")
    notes = _Notes()
    carried = carried_by(adapter)
    modules, left_out = modules_of(adapter, options)
    notes.dropped |= left_out
    if not destination.biases:
        modules, left_out = without_biases(modules, destination.name, options.drop)
        notes.dropped |= left_out
    shapes = {m: module_shape(adapter.entries[target], rows) for m, (target, rows) in modules.items()}
    model = options.model or model_named(adapter) or model_of(shapes, adapter.metadata)
    if destination.flat and model is None and any(m.component == "transformer" for m in modules):
        notes.notices["W_MODEL_UNKNOWN"] = (
            "the names do not tell which model this is, and were kept, which not every loader reads; name it with "
            "--model"
        )
    back = carried if carried is not None and carried.get("format") == to else None
    order = Order(
        model,
        (back or {}).get("config") or {},
        options.metadata,
        options.base.config if options.base else {},
        options.dtype == "q8_0",
    )
    names = (back or {}).get("names") or {}
    if type(adapter.format) is destination:
        odd = _odd_names(adapter, options).items()
        names = {usual: had for usual, had in odd if (p := adapter.format.place(had)) and p.rule != whisper.RULE}
    placements = _named(destination.arrange(shapes, order), names)
    jobs = jobs_for(placements, modules)
    builds = {job.target: _build(adapter, job, destination, options) for job in jobs}
    if options.portable or destination.uniform:
        builds = _uniform(builds, notes, scale=1.0 if options.portable else None)
    extras = _extras(adapter, destination, options, notes)
    if back is None:
        kept: Mapping[str, Any] = {}
        if type(adapter.format) is destination:
            without = bool(adapter.extras) and not extras
            kept = adapter.format.kept_config(set(builds), portable=options.portable, without_extras=without)
        order = replace(order, config=kept)
    bound, builds = _bind(destination, builds, order, options, notes)
    _note_changes(adapter, builds, options, notes)
    entries = {target: build.entry for target, build in builds.items()}
    metadata = metadata_for(adapter, destination, order, lambda: _odd_names(adapter, options))
    result = Adapter(bound, entries, extras, metadata, (), adapter.origin)
    if options.metadata:
        result = result.recorded("convert", _arguments(to, options))
    return result, _report(adapter, result, _told(adapter, builds), model, notes)


def _note_changes(adapter: Adapter, builds: Mapping[str, Build], options: Convert, notes: _Notes) -> None:
    """What of the file is no longer as it was, beside scales and ranks."""
    split = {s for b in builds.values() if not b.job.is_copy for s in b.job.sources}
    if split:
        notes.notices["I_SPLIT_FUSED"] = f"rows of {len(split)} targets were taken apart or joined, as names have it"
    dtypes = {spec.dtype for entry in adapter.entries.values() for spec in entry.specs.values()}
    if options.dtype is not None and dtypes - {options.dtype.upper()}:
        notes.notices["W_DTYPE_CAST"] = f"{', '.join(sorted(dtypes))} was rounded to {options.dtype}"
    if not options.metadata and adapter.metadata:
        notes.notices["W_METADATA_DROPPED"] = f"metadata was left out: {', '.join(sorted(adapter.metadata))}"


def _stays(adapter: Adapter, to: str, options: Convert) -> bool:
    """Whether the file is asked for in its own dialect, in a method that is not made there, or that shares tensors."""
    families = {entry.family.family for entry in adapter.entries.values()}
    shares = any(entry.family.references for entry in adapter.entries.values())
    made = not shares and any(families <= kind.holds for kind in writable_formats()[to])
    return adapter.format.name == to and not made and options == Convert(base=options.base, metadata=options.metadata)


def _without_copies(adapter: Adapter, options: Convert) -> tuple[Adapter, ConvertReport]:
    """The file as it is, but for tensors that it holds twice."""
    notes = _Notes()
    for key, other in adapter.format.copies().items():
        one, two = adapter.extras[key].read(), adapter.extras[other].read()
        if one.dtype == two.dtype and one.shape == two.shape and bool((one == two).all()):
            notes.dropped[key] = f"a copy of {other}"
    extras = {key: extra for key, extra in adapter.extras.items() if key not in notes.dropped}
    result = replace(adapter, extras=extras, warnings=(), record=None)
    if options.metadata:
        result = result.recorded("convert", _arguments(adapter.format.name, options))
    targets = {t: ConvertedTarget((t,), "as it was", e.family.family, e.rank) for t, e in adapter.entries.items()}
    return result, _report(adapter, result, targets, None, notes)


def convert_file(
    adapter: Adapter, path: str | os.PathLike[str], to: str, options: Convert = Convert(), *, force: bool = False
) -> tuple[Saved, ConvertReport]:
    """As `convert`, streamed to `path`, a few targets at a time."""
    return write_converted(*convert(adapter, to, options), path, force=force)


def write_converted(
    result: Adapter, report: ConvertReport, path: str | os.PathLike[str], *, force: bool = False
) -> tuple[Saved, ConvertReport]:
    """Stream to `path` what `convert` returned."""
    entries = result.entries
    updates = ordered_map(lambda t: (t, entries[t].read()), list(entries), workers=worker_count("cpu"))
    saved = write(result, updates, Path(path), force=force)
    before = result.origin.nbytes if result.origin else report.bytes_before
    return saved, replace(report, output=str(saved.path), bytes_before=before, bytes_after=saved.nbytes)


@dataclass(frozen=True)
class Build:
    """One target to be written: its entry, and what is said of it."""

    job: Job
    entry: Entry
    actions: tuple[str, ...]
    relative_error: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # that a family which stays as it is keeps in a config


def _named(placements: Mapping[str, Placement], names: Mapping[str, str]) -> dict[str, Placement]:
    """`placements` under the names that the file had before, where those are known and differ."""
    return {names.get(target, target): placement for target, placement in placements.items()}


def _build(adapter: Adapter, job: Job, destination: type[Format], options: Convert) -> Build:
    """The entry of a target, read anew whenever it is asked for."""
    sources = [adapter.entries[name] for name in job.sources]
    entry = sources[0]
    fits = destination.lacks(entry.layout, set(entry.specs)) is None
    held = fits and ("mid" not in entry.specs or "mid" in destination.slots)
    if job.is_copy and entry.family.family in destination.holds and held:
        return Build(job, entry, (), settings=adapter.format.settings(job.sources[0]))
    weights = {name: _base_weight(adapter, name, options.base) for name in job.sources}

    def build() -> tuple[Update, Lowered]:
        parts = {}
        state = Lowered()
        for name in job.sources:
            try:
                weight, bias = weights[name]()
                source, plain = adapter.entries[name].read(), not job.is_copy
                update, how = lowered(source, destination, weight, options.lowering, plain=plain, bias=bias)
            except AdapterError as error:
                raise type(error)(f"{name}: {error}") from error
            parts[name] = update
            state = state.worse(how)
        try:
            update, actions = made(job, parts)
        except AdapterError as error:
            raise type(error)(f"{job.target}: {error}") from error
        return update, state.worse(Lowered(actions))

    if held and (specs := _cut(job, entry)) is not None:
        entry = replace(entry, specs=specs, read=lambda: build()[0], alpha=None)
        return Build(job, entry, (f"rows of {job.sources[0]}",))
    first, state = build()
    entry = replace(entry_of(first), read=lambda: build()[0])
    return Build(job, entry, state.actions, state.relative_error)


def _cut(job: Job, entry: Entry) -> dict[str, TensorSpec] | None:
    """What is stored of a target that is some rows of another, where the shapes alone tell it: no value is read."""
    piece = job.pieces[0]
    plain = issubclass(entry.family, LoRA) and "mid" not in entry.specs and entry.layout.experts == 1
    # Where ranks come in as many parts, those that change another part alone fall away: the values tell which.
    shared_out = piece.part[1] > 1 and entry.rank % piece.part[1] == 0
    outputs = entry.specs["up"].shape[0] if plain else 0
    if job.is_copy or not plain or shared_out or len(job.pieces) > 1 or not piece.into.is_whole:
        return None
    if outputs % piece.rows.units:
        return None
    rows = outputs // piece.rows.units * piece.rows.count
    by_row = ("up", "up_bias")
    return {k: TensorSpec(s.dtype, (rows, *s.shape[1:])) if k in by_row else s for k, s in entry.specs.items()}


def _base_weight(adapter: Adapter, target: str, base: BaseWeights | None) -> Callable[[], tuple[Any, Any]]:
    """The weight and the bias of the base, for an update that needs them."""
    entry, name = adapter.entries[target], adapter.format.parameter(target)
    if base is None or not entry.needs_base:
        return lambda: (None, None)
    return lambda: (base.find(name, entry.base_shape), base.bias_of(name))


def _uniform(builds: Mapping[str, Build], notes: _Notes, *, scale: float | None) -> dict[str, Build]:
    """All targets at one rank, by zero padding, and at one scale unless it is None."""
    rank = max(b.entry.rank for b in builds.values())
    done = {}
    for target, build in builds.items():
        entry = build.entry
        if entry.rank == rank and scale in (None, entry.scale):
            done[target] = build
            continue
        if entry.rank != rank:
            notes.notices["W_RANK_PADDED"] = f"ranks below {rank} were padded with zeros, which changes nothing"

        def read(entry: Entry = entry) -> Update:
            return padded(entry.read(), rank, scale=entry.scale if scale is None else scale)

        actions = build.actions if entry.rank == rank else (*build.actions, f"padded from rank {entry.rank}")
        if scale not in (None, entry.scale):
            notes.notices["W_SCALE_FOLDED"] = _FOLDED.format("the scales of some targets were")
            actions = (*actions, "scale folded")
        done[target] = replace(build, entry=replace(entry_of(read()), read=read), actions=actions)
    return done


def _bind(
    destination: type[Format], builds: Mapping[str, Build], order: Order, options: Convert, notes: _Notes
) -> tuple[Format, dict[str, Build]]:
    """The new dialect, and the targets with the scales and the shapes that it can state."""
    parts = {t: _part(b, destination, options, notes, t) for t, b in builds.items()}
    bound = destination.compose(parts, order)
    stated = _stated_scales(bound, builds) if not options.fold_alpha and not options.portable else None
    done = {}
    folded = 0
    stored = STORED.get(options.dtype or "")
    for target, build in builds.items():
        entry, part = build.entry, parts[target]
        scale = bound.writable_scale(target, entry.rank, entry.scale, "fold" if options.fold_alpha else "keep")
        if stated is not None:
            scale = stated[target]
        actions = build.actions
        if not math.isclose(scale, entry.scale, rel_tol=_SAME):
            folded += 1
            actions = (*actions, "scale folded")
        drop = frozenset(set(entry.specs) - set(part.slots))

        def read(entry: Entry = entry, part: Part = part, scale: float = scale, drop: frozenset[str] = drop) -> Update:
            update = _without(entry.read(), drop)
            if not math.isclose(scale, update.scale, rel_tol=_SAME):
                update = rescaled(update, scale)
            if stored is not None:
                update = recast(update, stored)
            return _laid_out(update, part, destination)

        rewritten = stored is not None or bool(drop) or "scale folded" in actions or "magnitude" in part.slots
        specs = {slot: spec for slot, spec in entry.specs.items() if slot not in drop}
        if rewritten:
            fresh = entry_of(read())
            specs = dict(fresh.specs)
        done[target] = replace(
            build, entry=replace(entry, specs=specs, scale=scale, layout=part.layout, read=read), actions=actions
        )
    if folded:
        notes.notices["W_SCALE_FOLDED"] = _FOLDED.format(f"the scales of {folded} targets have no place and were")
    return bound, done


def _stated_scales(bound: Format, builds: Mapping[str, Build]) -> dict[str, float] | None:
    """The scales that a config which came back states, where they are those of the updates but for rounding."""
    try:
        scales = {t: bound.scale(t, b.entry.rank, None) for t, b in builds.items()}
    except (AdapterError, ZeroDivisionError):
        return None
    same = all(math.isclose(scales[t], b.entry.scale, rel_tol=_SAME) for t, b in builds.items())
    return scales if same else None


def _part(build: Build, destination: type[Format], options: Convert, notes: _Notes, target: str) -> Part:
    entry = build.entry
    slots = tuple(entry.specs)
    if "up_bias" in slots and "up_bias" not in destination.slots:
        if "bias" not in options.drop:
            raise UnsupportedInTargetError(
                f"{target}: {destination.name} has no place for the bias of lora_B; pass --drop bias to leave it out"
            )
        notes.dropped[target] = "its bias, which the dialect has no place for"
        slots = tuple(slot for slot in slots if slot != "up_bias")
    shapes = {slot: spec.shape for slot, spec in entry.specs.items()}
    settings = entry.read().stated_settings() if entry.family.references else build.settings
    return Part(slots, entry.layout, entry.base_shape, entry.rank, entry.scale, shapes, settings)


def _without(update: Update, slots: frozenset[str]) -> Update:
    if not slots:
        return update
    kept = {slot: t for slot, t in update.parameters().items() if slot not in slots}
    return type(update).from_parameters(kept, scale=update.scale, layout=update.layout)


def _laid_out(update: Update, part: Part, destination: type[Format]) -> Update:
    """With the magnitude in the shape in which the dialect keeps it."""
    parameters = update.parameters()
    if "magnitude" not in parameters:
        return update
    magnitude = parameters["magnitude"]
    shape = destination.magnitude_shape(part, magnitude.numel())
    if len(shape) > 1 and magnitude.ndim > 1 and _without_ones(magnitude.shape) == _without_ones(shape):
        return update  # as it was stored, for a kernel that the factors do not tell
    parameters["magnitude"] = magnitude.reshape(shape)
    return type(update).from_parameters(parameters, scale=update.scale, layout=update.layout)


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Without the ones at the end that stand for a kernel."""
    kept = len(shape)
    while kept and shape[kept - 1] == 1:
        kept -= 1
    return tuple(shape[:kept])


def _extras(adapter: Adapter, destination: type[Format], options: Convert, notes: _Notes) -> dict[str, Extra]:
    """Tensors that belong to no update: carried within a dialect, otherwise refused unless they may be dropped."""
    if type(adapter.format) is destination and not options.component and "extras" not in options.drop:
        return dict(adapter.extras)
    if not adapter.extras:
        return {}
    left = adapter.loose_extras
    unsupported = {key for key in left for t in adapter.unsupported if key == t or key.startswith(f"{t}.")}
    for kind, keys in (
        ("unsupported", [k for k in left if k in unsupported]),
        ("extras", [k for k in left if k not in unsupported]),
    ):
        if keys and kind not in options.drop:
            what = (
                "belong to targets that cannot be converted" if kind == "unsupported" else "are not part of any update"
            )
            raise UnsupportedInTargetError(
                f"{len(keys)} tensors {what}, and {destination.name} has no place for them, such as {keys[0]}; "
                f"pass --drop {kind} to leave them out"
            )
        notes.dropped |= dict.fromkeys(keys, "no place for it in the dialect")
    return {}


def _odd_names(adapter: Adapter, options: Convert) -> dict[str, str]:
    """Targets that the dialect would be given other names on the way back: the name it would get -> the one it had."""
    formats = writable_formats()
    if type(adapter.format) not in formats.get(adapter.format.name, ()):
        return {}
    modules = {
        piece.module: module_shape(adapter.entries[target], piece.rows)
        for target in adapter.entries
        if (placement := adapter.format.place(target))
        for piece in placement.pieces
    }
    order = Order(options.model or model_named(adapter) or model_of(modules, adapter.metadata))
    try:
        usual = type(adapter.format).arrange(modules, order)
    except AdapterError:
        return {}
    had = {piece.module: t for t in adapter.entries if (p := adapter.format.place(t)) for piece in p.pieces}
    odd = {}
    for target, placement in usual.items():
        names = {had[piece.module] for piece in placement.pieces if piece.module in had}
        if len(names) == 1 and target not in names:
            odd[target] = names.pop()
    return odd


def _arguments(to: str, options: Convert) -> dict[str, object]:
    chosen: dict[str, object] = {"to": to}
    for name in ("portable", "fold_alpha"):
        if getattr(options, name):
            chosen[name] = True
    if options.drop:
        chosen["drop"] = sorted(options.drop)
    if options.lowering != Lowering():
        chosen["lowering"] = repr(options.lowering)
    return chosen


def _told(adapter: Adapter, builds: Mapping[str, Build]) -> dict[str, ConvertedTarget]:
    """What the report says of every target."""
    return {
        target: ConvertedTarget(
            build.job.sources,
            " and ".join(dict.fromkeys(p.rule for s in build.job.sources if (p := adapter.format.place(s)))),
            b.family.family,
            b.rank,
            build.actions,
            build.relative_error,
        )
        for target, build in builds.items()
        for b in (build.entry,)
    }


def _report(
    adapter: Adapter,
    result: Adapter,
    targets: Mapping[str, ConvertedTarget],
    model: Model | None,
    notes: _Notes,
) -> ConvertReport:
    total = sum(len(e.specs) for e in adapter.entries.values())
    scales = sum(adapter.format.scale_key(t) is not None for t in adapter.entries)
    keys = {
        "updates": total,
        "scales": scales,
        "carried": len(result.extras),
        "dropped": len(notes.dropped),
    }
    return ConvertReport(
        adapter.format.name,
        result.format.name,
        model,
        targets,
        keys,
        notes.dropped,
        notes.notices,
        adapter.nbytes,
        result.nbytes,
        (*adapter.warnings, *(f"{text} ({code})" for code, text in notes.notices.items() if code.startswith("W_"))),
    )
