"""A base model with an adapter added to its weights, one file after another."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.adapter import Adapter
from loratools.errors import (
    AdapterError,
    InputError,
    NotAWeightDeltaError,
    OutputError,
    TiedEmbeddingError,
)
from loratools.families import LoRA
from loratools.operators import Dense
from loratools.ops.delta import delta_of_target, parameters_of_target, replacements
from loratools.ops.initial import ON_THE_BASE, refuse_mutated
from loratools.ops.pissa import holds_principal_part
from loratools.reports.fuse import FusedParameter, FuseReport
from loratools.storage.atomic import explained, printable, refuse_existing
from loratools.storage.folder import AtomicFolder
from loratools.storage.header import header_bytes
from loratools.storage.safetensors import SafetensorsSink
from loratools.storage.sharded import ShardedSource

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.base_weights import BaseWeights

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_LARGEST_COPY = 256 << 20  # of files that are no weights: a tokenizer is far smaller
_NAMED = 6  # targets in a message


def fuse(adapter: Adapter, base: BaseWeights, path: str | os.PathLike[str], *, force: bool = False) -> FuseReport:
    """Write the base model with the adapter's updates added: a folder of the base's own files, shards and dtypes.

    Sums are made in float32 and rounded once to the base's dtype; no more than one parameter and its update are in
    memory. Files beside the weights (config, tokenizer) are copied. Raises AdapterError for targets that the base
    lacks, TiedEmbeddingError, MutatedBaseError for PiSSA and its kin, NotAWeightDeltaError for what is no update of a
    weight, OutputError where `path` exists.
    """
    place = Path(path)
    _check_output(place, base, force)
    refuse_unfusable(adapter)
    source = base.source
    if source.container == "gguf":
        raise InputError(f"{printable(source.path)}: is a GGUF model; fuse into the safetensors that it was made from")
    sums = _Sums(adapter, base, _plan(adapter, base), replacements(adapter, base))
    files = _files(base)
    metadata = {"format": "pt"}
    nbytes = 0
    with AtomicFolder(place) as folder:
        for name, tensors in files.items():
            room = len(header_bytes({key: source.specs[key] for key in tensors}, metadata))
            with SafetensorsSink(folder.temporary / name, reserve=room, named=False) as sink:
                for key in tensors:
                    sink.write(key, sums.fused(key))
                nbytes += sink.commit(metadata)
        if isinstance(source, ShardedSource):
            total = sum(spec.nbytes for spec in source.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(source.home)}
            folder.write_text(source.path.name, json.dumps(index, indent=2) + "\n")
        copied = _copy_the_rest(source.path.parent, folder.temporary, place) if base.config else ()
        folder.commit()
    return _report(adapter, base, place, (*files, *copied), sums, nbytes)


@dataclass
class _Sums:
    """Adds up what changes each parameter, keeping the update of the last target for the next parameter."""

    adapter: Adapter
    base: BaseWeights
    plan: Mapping[str, tuple[str, ...]]  # parameter -> targets
    replaced: Mapping[str, Callable[[], Tensor]]
    done: dict[str, FusedParameter] = field(default_factory=dict)
    norms: list[tuple[float, float, float]] = field(default_factory=list)
    principal: list[bool] = field(default_factory=list)  # whether each change looks like a part of the weight
    _last: tuple[str, dict[str, Tensor]] = ("", {})

    def fused(self, parameter: str) -> Tensor:
        weight = self.base.source.read(parameter)
        changes = [
            c for target in self.plan.get(parameter, ()) if (c := self._of(target).pop(parameter, None)) is not None
        ]
        sources = self.plan.get(parameter, ()) if changes else ()
        if parameter in self.replaced:
            changes.append(self.replaced[parameter]())
            sources = (*sources, "replaced")
        if not changes:
            return weight
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise AdapterError(f"{parameter}: the base holds it as {weight.dtype}; fuse into a base of 16 or 32 bits")
        before = weight.float()
        after = before.clone()
        for change in changes:
            after += change
        if not bool(torch.isfinite(after).all()):
            raise AdapterError(f"{parameter}: base and update make NaN or infinity")
        stored = after.to(weight.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise AdapterError(f"{parameter}: the sum is too large for {weight.dtype}; fuse into a base of 32 bits")
        entries = [self.adapter.entries[target] for target in self.plan.get(parameter, ())]
        if weight.ndim == 2 and {entry.family for entry in entries} == {LoRA}:
            rank = min(sum(entry.rank for entry in entries), *weight.shape)
            self.principal.append(holds_principal_part(Dense(after - before), before, rank))
        norm, moved, lost = (float(t.double().norm()) for t in (before, after - before, stored.float() - after))
        self.norms.append((norm, moved, lost))
        self.done[parameter] = FusedParameter(sources, _ratio(moved, norm), _ratio(lost, moved))
        return stored

    def _of(self, target: str) -> dict[str, Tensor]:
        if self._last[0] != target:
            self._last = ("", {})  # freed before the next one is made
            made = dict(delta_of_target(self.adapter, target, self.base))
            if unknown := [name for name in made if name not in self.base.source.specs]:
                raise AdapterError(f"{target}: changes {unknown[0]}, which the base does not have")
            self._last = (target, made)
        return self._last[1]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0


def _check_output(place: Path, base: BaseWeights, force: bool) -> None:
    if place.exists() and place.resolve() == base.source.path.parent.resolve():
        raise OutputError(f"{printable(place)}: is the base model; choose another output")
    if place.is_file():
        raise OutputError(f"{printable(place)}: is a file; the fused model is a folder")
    refuse_existing(place, force=force)


def refuse_unfusable(adapter: Adapter) -> None:
    where = printable(adapter.origin.path) if adapter.origin else "the adapter"
    if (adapter.config or {}).get("alora_invocation_tokens"):
        raise AdapterError(f"{where}: an activated LoRA applies only after its invocation tokens; it cannot be fused")
    refuse_mutated(adapter, ON_THE_BASE)
    if adapter.unsupported:
        name, why = next(iter(adapter.unsupported.items()))
        raise NotAWeightDeltaError(f"{where}: {len(adapter.unsupported)} parts cannot be fused, such as {name}: {why}")


def _plan(adapter: Adapter, base: BaseWeights) -> dict[str, tuple[str, ...]]:
    """Parameter -> the targets that change it; AdapterError names those that the base lacks."""
    plan: dict[str, tuple[str, ...]] = {}
    missing = []
    for target in adapter.entries:
        parameters = parameters_of_target(adapter, target, base)
        if not parameters:
            missing.append(target)
        for parameter in parameters:
            plan[parameter] = (*plan.get(parameter, ()), target)
    tied = bool(base.config.get("tie_word_embeddings"))
    if tied and (heads := [target for target in missing if target.split(".")[-1] == "lm_head"]):
        raise TiedEmbeddingError(
            f"{heads[0]}: the base ties its output to the embedding, and has no parameter for it; untie the base "
            "(tie_word_embeddings: false, with a copy of the embedding as lm_head.weight), then fuse"
        )
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise AdapterError(
            f"{printable(base.source.path)}: has no parameters for {len(missing)} of {len(adapter.entries)} targets: "
            f"{', '.join(missing[:_NAMED])}{more}; is it the right base?"
        )
    return plan


def _files(base: BaseWeights) -> dict[str, list[str]]:
    """File name -> its tensors, in the base's order."""
    source = base.source
    if not isinstance(source, ShardedSource):
        name = source.path.name if source.path.suffix == ".safetensors" else "model.safetensors"
        return {name: list(source.specs)}
    files: dict[str, list[str]] = {}
    for tensor, shard in source.home.items():
        files.setdefault(shard, []).append(tensor)
    return files


def _copy_the_rest(origin: Path, destination: Path, place: Path) -> tuple[str, ...]:
    copied = []
    with explained(place):
        for file in _small_files(origin):
            shutil.copyfile(file, destination / file.name)
            copied.append(file.name)
    return tuple(copied)


def _small_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.stat().st_size <= _LARGEST_COPY:
            yield file


def _report(
    adapter: Adapter, base: BaseWeights, place: Path, files: tuple[str, ...], sums: _Sums, nbytes: int
) -> FuseReport:
    held = adapter.format.replacements()
    used = {key for key, parameter in held.items() if base.name_of(parameter) in sums.replaced}
    skipped = {key: "belongs to no update" for key in adapter.loose_extras if key not in used}
    skipped |= {k: f"the base has no parameter {held[k]}" for k in skipped if k in held}
    warnings = list(adapter.warnings)
    if base.config.get("tie_word_embeddings"):
        ends = [p for p in sums.done if p.endswith(("embed_tokens.weight", "wte.weight"))]
        warnings += [f"{p}: is tied to the output, which changes with it" for p in ends]
    if 2 * sum(sums.principal) > len(sums.principal):
        warnings.append(
            "most updates are large parts of the weights that they change, as a PiSSA's factors are, which go with a "
            "residual base: on the original one they count twice"
        )
    before, moved, lost = (math.hypot(*column) for column in zip(*sums.norms, strict=True)) if sums.norms else (0, 0, 0)
    total = {"relative_change": _ratio(moved, before), "lost": _ratio(lost, moved)}
    return FuseReport(str(place), sums.done, files, skipped, total, nbytes, tuple(warnings))
