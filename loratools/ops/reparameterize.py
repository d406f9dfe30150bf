"""The same deltas in another family: exactly where it can, else as near as it comes, with the loss told."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.adapter import Adapter, Entry, Extra, entry_of
from loratools.errors import AdapterError, NeedsBaseError, UsageError
from loratools.families import fittable
from loratools.families.fitting import Fittable, Source, options_of
from loratools.files import Saved, save
from loratools.formats import Order, writable_formats
from loratools.formats.modules import WHOLE
from loratools.formats.native import SHARED, Described, Native
from loratools.linalg.inner import frobenius
from loratools.operators import BlockDiagonal
from loratools.ops.carried import carried_by, metadata_for
from loratools.ops.convert import convert
from loratools.ops.initial import refuse_mutated
from loratools.ops.measuring import Source as Measured
from loratools.ops.measuring import in_memory, size_of
from loratools.ops.spectra import base_tensor, is_finite_update, nonfinite_error
from loratools.pipeline import ordered_map, worker_count
from loratools.reports.reparameterize import ReparameterizeReport, TargetFitted
from loratools.storage.base import DTYPES
from loratools.storage.header import spec_of

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update
    from loratools.ops.statistics import Statistics

LOSSY = 0.5  # relative error above which a fit has to be asked for
_WIDTHS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Reparameterize:
    """How to write deltas in another family.

    `options`: the family's own, by name, as text; `budget`: bytes of all stored tensors, from which the options
    follow, instead. `base`: for families that need it; `dtype`: of stored numbers, by default the one that most have.
    `accept_loss` lets a fit lose more than half of the norm. `statistics`: of inputs, for families that weigh by them.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    budget: int | None = None
    base: BaseWeights | None = None
    dtype: str | None = None
    seed: int = 0
    accept_loss: bool = False
    statistics: Statistics | None = None

    def __post_init__(self) -> None:
        if self.options and self.budget is not None:
            raise UsageError("a budget decides the options of the family; give one or the other")
        if self.dtype is not None and self.dtype not in _WIDTHS:
            raise UsageError(f"the dtype {self.dtype!r} is none of {', '.join(_WIDTHS)}")


def reparameterize(
    adapter: Adapter, to: str, how: Reparameterize = Reparameterize(), *, step: Callable[[], None] | None = None
) -> tuple[Adapter, ReparameterizeReport]:
    """The adapter with its deltas in the family `to`, in memory, in loratools' own dialect, and what was lost.

    Norms and biases are carried over. `step` is called after each target. Raises UsageError for an unknown family,
    AdapterError where it cannot hold a target or would lose more than half of the norm, NeedsBaseError without a base
    that is needed.
    """
    family = fittable(to)
    adapter.require_weights()
    refuse_mutated(adapter, "another family cannot say which base weight that leaves")
    adapter = in_memory(adapter)
    sources, carried, biased = sources_of(adapter, family, how)
    if not sources:
        raise AdapterError(f"no target of the adapter is a matrix that {to} could hold")
    chosen = options_for(family, sources, how)
    options = next(iter(chosen.values()))
    updates = encoded(family, sources, chosen)
    made = composed(adapter, updates | carried, names_of(adapter)).recorded("reparameterize", arguments_of(family, how))
    found = _told(Measured(adapter, base=how.base), made, sources, step)
    errors = {target: math.sqrt(error / norm) if norm else 0.0 for target, (error, norm) in found.items()}
    error, norm = (math.fsum(column) for column in zip(*found.values(), strict=True))
    total_error = math.sqrt(error / norm) if norm else 0.0
    expected = _expected(family, sources, options)
    if total_error > LOSSY and not how.accept_loss:
        raise AdapterError(
            f"{to} would lose {100 * total_error:.0f} % of the delta's norm"
            + ("" if expected is None else f" ({100 * math.sqrt(1 - expected):.0f} % are lost of a generic delta)")
            + "; allow it more numbers, or pass --accept-loss"
        )
    targets = {
        target: TargetFitted(
            adapter.entries[target].family.family,
            entry_of(update).rank,
            sum(t.numel() for t in update.parameters().values()),
            sum(t.nbytes for t in update.parameters().values()),
            errors[target],
            max(0.0, 1 - errors[target] ** 2),
        )
        for target, update in updates.items()
    }
    total: dict[str, float | int | None] = {
        "targets": len(adapter.entries) + len(adapter.unsupported),
        "fitted": len(targets),
        "numbers": sum(t.numbers for t in targets.values()) + sum(e.spec.numel for e in made.extras.values()),
        "relative_error": total_error,
        "energy_kept": max(0.0, 1 - total_error**2),
        "bytes_before": adapter.file_nbytes,
        "bytes_after": size_of(made),
    }
    reasons = dict(adapter.unsupported) | dict.fromkeys(carried, "carried over: no matrix")
    notes = list(adapter.warnings)
    if family.reconstruction:
        notes.append(f"{to} is a reconstruction: {family.reconstruction}")
    if biased:
        notes.append(f"{len(biased)} targets change their bias too, which was left out; the first is {biased[0]}")
    if lost := adapter.loose_extras:
        notes.append(f"{len(lost)} tensors that belong to no target were left out, such as {lost[0]}")
    return made, ReparameterizeReport(
        to, family.guarantee, asdict(options), targets, reasons, expected, total, tuple(notes)
    )


def formerly(made: Adapter) -> Adapter:
    """An adapter of LoRA in the dialect that it came from, or in PEFT's where that is not written."""
    before = carried_by(made)
    name = str((before or {}).get("format"))
    return convert(made, name if name in writable_formats() and name != Native.name else "peft")[0]


def reparameterize_file(
    made: Adapter, report: ReparameterizeReport, path: str | os.PathLike[str], *, force: bool = False
) -> tuple[Saved, ReparameterizeReport]:
    """Save what `reparameterize` made, and say in its report where, and how large the file is."""
    saved = save(made, path, force=force)
    total = {**report.total, "bytes_after": saved.nbytes}
    return saved, replace(report, total=total, output=str(saved.path))


def sources_of(
    adapter: Adapter, family: type[Fittable], how: Reparameterize
) -> tuple[dict[str, Source], dict[str, Update], list[str]]:
    """The deltas to be fitted, the updates carried over as they are, and the targets that change a bias too."""
    sources: dict[str, Source] = {}
    carried: dict[str, Update] = {}
    biased: list[str] = []
    dtype = getattr(torch, DTYPES[_WIDTHS[how.dtype] if how.dtype else adapter.usual_dtype][0])
    for target, entry in adapter.entries.items():
        shape, weight = _base(adapter, target, entry, family, how.base)
        update = entry.read()
        if not is_finite_update(update):
            raise nonfinite_error(target, "leave it out")
        if len(shape) < 2:
            carried[target] = update
            continue
        try:
            delta = update.operator(weight).to(torch.float64)
        except AdapterError as error:
            raise type(error)(f"{target}: {error}") from error
        if isinstance(delta, BlockDiagonal):
            raise AdapterError(f"{target}: a stack of experts or a grouped convolution has no other family")
        if update.bias_delta() is not None:
            biased.append(target)
        squares = None if how.statistics is None else how.statistics.channels(target)
        sources[target] = Source(
            delta, replace(entry.layout, shape=shape, magnitude_axis=0), weight, dtype, how.seed, squares
        )
    return sources, carried, biased


def _base(
    adapter: Adapter, target: str, entry: Entry, family: type[Fittable], base: BaseWeights | None
) -> tuple[tuple[int, ...], Tensor | None]:
    """The shape of the base parameter, and the parameter where it is needed."""
    weight = base_tensor(adapter, target, entry, base)
    if weight is None and (base is not None) and (family.fits_with_base or entry.base_shape is None):
        weight = base.find(adapter.format.parameter(target), entry.base_shape)
    if weight is None and family.fits_with_base:
        raise NeedsBaseError(f"{target}: {family.family} is fitted to the base weight; pass --base")
    shape = entry.base_shape if weight is None else tuple(weight.shape)
    if shape is None:
        raise NeedsBaseError(f"{target}: the file does not tell the shape of the base weight; pass --base")
    return shape, weight


def options_for(family: type[Fittable], sources: Mapping[str, Source], how: Reparameterize) -> dict[str, Any]:
    """The options of every target, as stated or by the budget; nothing is fitted. UsageError for too small a budget."""
    if how.budget is None:
        return dict.fromkeys(sources, options_of(family, how.options))
    return family.within_together(sources, how.budget)


def encoded(family: type[Fittable], sources: Mapping[str, Source], options: Mapping[str, Any]) -> dict[str, Update]:
    """Every target in `family`; those that have the same options share what a family shares."""
    groups: dict[Any, dict[str, Source]] = {}
    for target, own in options.items():
        groups.setdefault(own, {})[target] = sources[target]
    found: dict[str, Update] = {}
    for own, members in groups.items():
        found |= family.encode_together(members, own)
    return {target: found[target] for target in sources}


def _told(
    measured: Measured, made: Adapter, targets: Iterable[str], step: Callable[[], None] | None
) -> dict[str, tuple[float, float]]:
    """(squared error, squared norm) of each target, as stored."""
    names = names_of(measured.adapter)

    def work(target: str) -> tuple[float, float]:
        return measured.squares(target, made, names[target])[:2]

    found = {}
    for target, pair in zip(targets, ordered_map(work, targets, workers=worker_count("cpu")), strict=True):
        found[target] = pair
        if step is not None:
            step()
    return found


def _expected(family: type[Fittable], sources: Mapping[str, Source], options: Any) -> float | None:
    """The share of energy that generic deltas of these norms keep."""
    shares = [(family.expected_energy(s, options), frobenius(s.delta) ** 2) for s in sources.values()]
    known = [(share, norm) for share, norm in shares if share is not None]
    total = math.fsum(norm for _, norm in known)
    return min(1.0, math.fsum(share * norm for share, norm in known) / total) if total else None


def names_of(adapter: Adapter) -> dict[str, str]:
    """Every target's name in loratools' dialect: the module's path where it is one whole module, else as it was."""
    names = {}
    for target in adapter.entries:
        placement = adapter.format.place(target)
        whole = placement is not None and len(placement.pieces) == 1 and placement.pieces[0].rows == WHOLE
        names[target] = str(placement.pieces[0].module) if placement is not None and whole else target
    return names if len(set(names.values())) == len(names) else {target: target for target in names}


def composed(adapter: Adapter, updates: Mapping[str, Update], names: Mapping[str, str]) -> Adapter:
    """An adapter of `updates` in loratools' dialect, named by `names`, with what `adapter` states carried along."""
    described, slots, parameters = {}, {}, {}
    shared: dict[str, Tensor] = {}
    for target, update in updates.items():
        name = names[target]
        keys = {}
        for slot, tensor in update.shared_tensors().items():
            keys[slot] = next((key for key, held in shared.items() if held is tensor), f"{SHARED}{len(shared)}.{slot}")
            shared[keys[slot]] = tensor
        shape = update.layout.shape or entry_of(update).base_shape
        layout = replace(update.layout, shape=shape)
        described[name] = Described(layout, update.scale, update.stated_settings(), keys)
        slots[name] = tuple(update.parameters())
        parameters[name] = adapter.format.parameter(target)
    dialect = Native.of(described, slots, parameters)
    entries = {
        names[target]: replace(entry_of(update), layout=described[names[target]].layout)
        for target, update in updates.items()
    }
    extras = {key: Extra(spec_of(tensor), lambda tensor=tensor: tensor) for key, tensor in shared.items()}  # type: ignore[misc]
    metadata = metadata_for(adapter, Native, Order(), dict)
    return Adapter(dialect, entries, extras, metadata, (), adapter.origin)


def arguments_of(family: type[Fittable], how: Reparameterize) -> dict[str, Any]:
    """What the record of the file says."""
    told = {"to": family.family, **how.options}
    return told | {k: v for k in ("budget", "dtype", "seed") if (v := getattr(how, k)) not in (None, 0)}
