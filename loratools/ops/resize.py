"""An adapter of a pruned model for the full one, and back: LoRAM's recovery (arXiv 2502.13533), bit for bit."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from loratools._lazy import torch
from loratools.adapter import Adapter, Entry
from loratools.errors import AdapterError, InputError, UnchangedError
from loratools.families.lora import LoRA
from loratools.files import Saved, save
from loratools.formats.modules import WHOLE
from loratools.linalg.inner import frobenius
from loratools.ops.initial import refuse_mutated
from loratools.ops.prune_plan import Choice, PrunePlan
from loratools.ops.spectra import is_finite_update, nonfinite_error
from loratools.reports.resize import ResizedTarget, ResizeReport
from loratools.storage.base import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update
    from loratools.ops.prune_plan import Cut

Verb = Literal["expand", "restrict"]
_FACTORS = frozenset({"down", "up", "up_bias"})


def expand(adapter: Adapter, plan: PrunePlan, *, base: BaseWeights | None = None) -> tuple[Adapter, ResizeReport]:
    """The adapter of a pruned model for the full one, lazily: zeros where the plan took an output or an input away.

    Kept numbers stay as they are, in their dtype; rank and scale do not change, and the delta is exactly that of the
    pruned model on what was kept, 0 elsewhere. With `base`, the full model, shapes are checked against it. Raises
    AdapterError, naming the target, for one that the plan does not fit or that has no such form, and UnchangedError
    where the plan cuts none.
    """
    return _resized(adapter, plan, "expand", base)


def restrict(adapter: Adapter, plan: PrunePlan, *, base: BaseWeights | None = None) -> tuple[Adapter, ResizeReport]:
    """The adapter of a full model for the pruned one, lazily: what the plan keeps of each factor, bit for bit.

    The inverse of `expand`; of another adapter the report says which share of the squared norm falls away. `base` is
    the pruned model. Raises what `expand` does.
    """
    return _resized(adapter, plan, "restrict", base)


def resize_file(
    made: Adapter, report: ResizeReport, path: str | os.PathLike[str], *, force: bool = False
) -> tuple[Saved, ResizeReport]:
    """Save what `expand` or `restrict` made, and say in its report where, and how large the file is."""
    saved = save(made, path, force=force)
    return saved, replace(report, output=str(saved.path), bytes_after=saved.nbytes)


@dataclass(frozen=True, eq=False)
class _Resize:
    """How one target changes: its sides before and after, and the places of the full side that the short one keeps."""

    before: tuple[int, int]
    after: tuple[int, int]
    outputs: Tensor | None
    inputs: Tensor | None

    def applied(self, update: LoRA, verb: Verb) -> LoRA:
        move = _scattered if verb == "expand" else _sliced
        (m, n), up, down, bias = self.after, update.up, update.down, update.up_bias
        if self.outputs is not None:
            up = move(up, 0, self.outputs, m)
            bias = None if bias is None else move(bias, bias.shape.index(self.before[0]), self.outputs, m)
        if self.inputs is not None:
            down = move(down, 1, self.inputs, n)
        return replace(update, up=up, down=down, up_bias=bias)


def _scattered(tensor: Tensor, axis: int, places: Tensor, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = size
    return torch.zeros(shape, dtype=tensor.dtype).index_copy(axis, places, tensor)


def _sliced(tensor: Tensor, axis: int, places: Tensor, size: int) -> Tensor:
    return tensor.index_select(axis, places)


def _resized(adapter: Adapter, plan: PrunePlan, verb: Verb, base: BaseWeights | None) -> tuple[Adapter, ResizeReport]:
    refuse_mutated(adapter, "the factors of another model say nothing of what was taken out of this one")
    moves = {}
    for target, entry in adapter.entries.items():
        cut = plan.find(*_names(adapter, target))
        if cut is not None:
            try:
                moves[target] = _planned(entry, cut, verb)
            except (AdapterError, InputError) as error:
                raise AdapterError(f"{target}: {error}") from error
    if not moves:
        raise UnchangedError(
            f"the plan cuts no target of the adapter; its modules are {', '.join(list(plan.cuts)[:3])}"
        )
    _check_extras(adapter, plan)
    if base is not None:
        _check_base(adapter, moves, base)
    entries = {t: _entry(e, moves[t], verb) if t in moves else e for t, e in adapter.entries.items()}
    made = replace(adapter, entries=entries).recorded(verb, {"modules": len(plan.cuts)})
    rows, lost, whole = {}, [], []
    for target, move in moves.items():
        update = adapter[target]
        if not is_finite_update(update):
            raise nonfinite_error(target, "leave it out")
        norm, left = frobenius(update.operator()) ** 2, frobenius(entries[target].read().operator()) ** 2
        gone = 0.0 if verb == "expand" else max(0.0, norm - left)
        rows[target] = ResizedTarget(
            (move.before[0], move.after[0]), (move.before[1], move.after[1]), gone / norm if norm else 0.0
        )
        lost.append(gone)
        whole.append(norm)
    total = math.fsum(whole)
    named = (adapter.config or {}).get("base_model_name_or_path")
    notes = [*adapter.warnings]
    if named:
        notes.append(f"base_model_name_or_path in the config still names the model of the input, {named}")
    report = ResizeReport(
        verb,
        rows,
        len(adapter.entries) - len(rows),
        math.fsum(lost) / total if total else 0.0,
        adapter.file_nbytes,
        made.nbytes,
        tuple(notes),
    )
    return made, report


def _names(adapter: Adapter, target: str) -> tuple[str, ...]:
    """The target's own name, and that of the one module that it is, where its dialect spells that otherwise."""
    placement = adapter.format.place(target)
    whole = placement is not None and len(placement.pieces) == 1 and placement.pieces[0].rows == WHOLE
    return (target, placement.pieces[0].module.path) if placement is not None and whole else (target,)


def _planned(entry: Entry, cut: Cut, verb: Verb) -> _Resize:
    if not issubclass(entry.family, LoRA) or not set(entry.specs) <= _FACTORS:
        raise AdapterError(
            f"a {entry.family.family} has no rows and columns to move"
            + (": norms of pruned weights are others" if entry.family.family == "dora" else "")
            + "; convert it to LoRA first"
        )
    up, down = entry.specs["up"].shape, entry.specs["down"].shape
    if len(up) != 2 or len(down) != 2 or entry.layout.experts > 1 or entry.layout.shape is not None:
        raise AdapterError(
            "only two factors of a linear module can be moved, in a dialect that states no shapes; convert it first: "
            "loratools convert --to peft"
        )
    (m, outputs), (n, inputs) = (
        _side(cut.outputs, up[0], verb, halves=cut.halves),
        _side(cut.inputs, down[1], verb, halves=False),
    )
    return _Resize((up[0], down[1]), (m, n), outputs, inputs)


def _side(choice: Choice | None, size: int, verb: Verb, *, halves: bool) -> tuple[int, Tensor | None]:
    """The side's length afterwards, and the places that are kept of the full one; None where nothing changes."""
    if choice is None:
        return size, None
    parts = 2 if halves else 1
    if size % parts:
        raise AdapterError(f"{size} outputs are no two halves")
    full = choice.full(size // parts) if verb == "expand" else size // parts
    kept = choice.kept(full)
    places = torch.cat([kept + part * full for part in range(parts)])
    if not len(places):
        raise AdapterError("the plan keeps nothing of it")
    return (full * parts if verb == "expand" else len(places)), places


def _entry(entry: Entry, move: _Resize, verb: Verb) -> Entry:
    specs = {}
    for slot, spec in entry.specs.items():
        shape = list(spec.shape)
        if slot == "down":
            shape[1] = move.after[1]
        elif slot == "up":
            shape[0] = move.after[0]
        else:
            shape = [move.after[0] if size == move.before[0] else size for size in shape]
        specs[slot] = TensorSpec(spec.dtype, tuple(shape))

    def read() -> Update:
        update = entry.read()
        assert isinstance(update, LoRA)
        return move.applied(update, verb)

    return replace(entry, specs=specs, read=read)


def _check_extras(adapter: Adapter, plan: PrunePlan) -> None:
    for key, parameter in adapter.format.replacements().items():
        if plan.find(parameter.rpartition(".")[0]) is not None:
            raise AdapterError(f"{key}: replaces a parameter of a module that the plan cuts; it cannot be moved")


def _check_base(adapter: Adapter, moves: dict[str, _Resize], base: BaseWeights) -> None:
    for target, move in moves.items():
        name = adapter.format.parameter(target)
        shape = base.shape_of(name)
        expected = move.after[::-1] if adapter.entries[target].layout.transposed else move.after
        if shape is not None and shape != expected:
            raise AdapterError(f"{target}: would be for {expected} where the base has {shape}; is it the right model?")
