"""Adapters to and from disk: where containers, dialects and families meet."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.adapter import RECORD_KEY, Adapter, Entry, Extra, Origin, entry_of
from loratools.configs import CONFIG_NAME, config_beside, read_config
from loratools.errors import AdapterError, InputError, OutputError, naming
from loratools.families import family_of
from loratools.formats import Declaration, Format, Header, Hints, NestedScaling, Written, recognise
from loratools.formats.packing import packed, unpacked, unpacked_spec
from loratools.petl import open_petl
from loratools.pipeline import begun
from loratools.storage import open_source
from loratools.storage.atomic import printable, refuse_existing
from loratools.storage.base import DTYPES, TensorSink, TensorSource
from loratools.storage.folder import AtomicFolder
from loratools.storage.gguf import GGUFSink
from loratools.storage.header import header_bytes, quoted
from loratools.storage.packed import CONFIG_KEY, Content, PackedSink
from loratools.storage.safetensors import SafetensorsSink

if TYPE_CHECKING:
    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update

WEIGHTS_NAME = "adapter_model.safetensors"
# The names that libraries give an adapter's weights, which go before any other file in the folder.
WEIGHTS_NAMES = (
    WEIGHTS_NAME,
    f"{WEIGHTS_NAME}.index.json",
    "adapter_model.bin",
    "adapters.safetensors",  # MLX-LM
    "adapter.safetensors",  # AdapterHub
    "pytorch_adapter.bin",
    "lit_model.pth.lora",  # LitGPT
)
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
# By which rank and alpha fields of the metadata may grow: "4" to "Dynamic", or to six digits.
_METADATA_SLACK = 32


@dataclass(frozen=True)
class Saved:
    """What was written: the weights file, its size, and the config beside it if the dialect has one."""

    path: Path
    weights: Path
    nbytes: int
    config: Path | None


def load(
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    scaling: NestedScaling | None = None,
    enable_lora: Sequence[bool] | None = None,
    base: BaseWeights | None = None,
    petl: str | os.PathLike[str] | None = None,
    thresholds: float | Mapping[str, float] | None = None,
) -> Adapter:
    """Open an adapter, a file or a folder, reading headers only; tensors are read when a target is looked up.

    `alpha`, `scaling` for MatryoshkaLoRA, and `enable_lora` for fused projections of loralib (one flag for each) stand
    in for what the file does not state; the shapes and the config of `base` do too, for random projections that were
    not saved, transposed weights and the number of heads. `petl` is the YAML of a file of PETL-ViT, where it does
    not lie beside the file under the same name; `thresholds` are the shares of entries that SNELL drops, one for all
    targets or one for each. Raises InputError for what cannot be read or recognised and AdapterError for incomplete or
    mismatched updates, naming file and target.
    """
    weights, config_path = locate(Path(path))
    hints = Hints(
        alpha, scaling, enable_lora=None if enable_lora is None else tuple(enable_lora), thresholds=thresholds
    )
    if base is not None:
        hints = replace(hints, base_shape=base.shape_of, base_config=base.config)
    source = open_petl(weights, petl) or open_source(weights)
    try:
        config = config_of(source, config_path)
        return adapter_of(source, config, beside=partial(config_beside, weights.parent), hints=hints)
    except BaseException:
        source.close()
        raise


def config_of(source: TensorSource, config_path: Path | None) -> dict[str, Any] | None:
    """The config of an adapter: a packed file holds its own, others have it in a file beside them."""
    stated = source.metadata.get(CONFIG_KEY) if source.container == "packed" else None
    if stated:
        config: dict[str, Any] = json.loads(stated)
        return config
    return read_config(config_path) if config_path else None


def adapter_of(
    source: TensorSource,
    config: Mapping[str, Any] | None,
    *,
    beside: Callable[[str], Mapping[str, Any] | None] = lambda name: None,
    hints: Hints | None = None,
) -> Adapter:
    """The adapter whose tensors are in a container; errors as `load`."""
    weights, metadata = source.path, dict(source.metadata)
    if source.container == "packed":
        metadata.pop(CONFIG_KEY, None)
    header = Header(weights, source.specs, metadata, config, beside)
    bound = recognise(header).bind(header, hints or Hints())
    entries, zeros = {}, []
    for target, keys in bound.keys.items():
        try:
            alpha_stored = _stored_alpha(source, bound, target)
            entries[target] = _entry(source, bound, target, keys, alpha_stored)
        except AdapterError as error:
            raise type(error)(f"{printable(weights)}: {target}: {error}") from error
        if alpha_stored == 0.0 and entries[target].rank:
            zeros.append(target)
    if not entries and not bound.unsupported and not bound.replacements():
        raise InputError(f"{printable(weights)}: no adapter weights in it, only {len(bound.extras)} other tensors")
    warnings = [*bound.warnings]
    if zeros:
        warnings.append(
            f"alpha is 0 for {len(zeros)} targets, read as alpha = rank as sd-scripts does; first: {zeros[0]}"
        )
    if skipped := getattr(source, "skipped", ()):
        first = ", ".join(quoted(name) for name in skipped[:3])
        warnings.append(f"{len(skipped)} entries that are not tensors were left out: {first}")
    extras = {key: Extra(source.specs[key], lambda key=key: source.read(key)) for key in bound.extras}  # type: ignore[misc]
    origin = Origin(weights, source.container, source.nbytes, source.sha256, source.close, dict(source.codings))
    return Adapter(bound, entries, extras, metadata, tuple(warnings), origin)


def _stored_alpha(source: TensorSource, bound: Format, target: str) -> float | None:
    key = bound.scale_key(target)
    try:
        return None if key is None else source.read_scalar(key)
    except ValueError as error:
        raise AdapterError(f"its alpha cannot be read: {error}") from error


def _entry(source: TensorSource, bound: Format, target: str, keys: Mapping[str, str], alpha: float | None) -> Entry:
    family = family_of(keys)
    layout = bound.layout(target)
    specs = {slot: unpacked_spec(source.specs[key], slot, bound.packing(target, slot)) for slot, key in keys.items()}
    if problem := family.check(specs, layout):
        raise AdapterError(problem)
    rank = family.rank_of(specs, layout)
    scale = bound.scale(target, rank, alpha)
    if not math.isfinite(scale):
        raise AdapterError(f"its alpha makes the scale {scale}")
    references = bound.references(target)
    settings = {**bound.settings(target), **({} if alpha is None else {"alpha": alpha})}
    if missing := sorted(family.references - set(references) - family.redrawn(settings)):
        raise AdapterError(f"the tensors that its targets share are not in the file: {', '.join(missing)}")

    def read() -> Update:
        tensors = {s: unpacked(source.read(key), s, bound.packing(target, s)) for s, key in keys.items()}
        shared = {slot: source.read(key) for slot, key in references.items()}
        with naming(target):
            return family.from_parameters(tensors | shared, scale=scale, layout=layout, settings=settings)

    return Entry(family, specs, layout, rank, scale, read, alpha)


def locate(path: Path) -> tuple[Path, Path | None]:
    """The weights file of an adapter and the config that goes with it, if any; InputError where there is no choice."""
    if path.is_dir():
        named = [path / name for name in WEIGHTS_NAMES if (path / name).is_file()]
        found = named[:1] or sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
        if len(found) > 1:
            listed = ", ".join(p.name for p in found[:6])
            raise InputError(f"{printable(path)}: several weights files; name one of {listed}")
        if not found:
            folders = sorted(p.name for p in path.iterdir() if (p / CONFIG_NAME).is_file())
            hint = f"; adapters lie in {', '.join(folders[:6])}" if folders else ""
            raise InputError(f"{printable(path)}: no adapter weights ({', '.join(WEIGHTS_NAMES)}) in this folder{hint}")
        weights = found[0]
    else:
        weights = path
    config = weights.parent / CONFIG_NAME
    is_stated = weights.suffix == ".gguf"  # in the file itself: a config beside it is that of the adapter it came from
    return weights, config if config.is_file() and not is_stated else None


def is_folder_adapter(adapter: Adapter) -> bool:
    """Whether the dialect keeps a config beside the weights, so that the adapter is a folder."""
    return adapter.config is not None


def destination_weights(adapter: Adapter, path: Path) -> Path:
    """The weights file that saving to `path` would write; OutputError for a name that does not suit the dialect."""
    if not is_folder_adapter(adapter):
        suffix = f".{adapter.format.container}"
        return path if path.suffix == suffix else path.with_name(path.name + suffix)
    name = adapter.format.weights_name
    if path.name == name:
        return path
    if path.suffix in SUFFIXES:
        raise OutputError(
            f"{printable(path)}: this adapter is a folder (weights and {CONFIG_NAME}); name a folder, such as "
            f"{printable(path.with_suffix(''))}"
        )
    return path / name


def check_writable(adapter: Adapter, path: Path) -> None:
    """OutputError where the dialect is only read, unless all there is to write are tensors that are carried along."""
    if not adapter.format.writable and adapter.entries:
        raise OutputError(
            f"{printable(path)}: {adapter.format.name} files are read, not written; write the adapter in another "
            "dialect first: loratools convert --to peft"
        )


def check_destination(adapter: Adapter, path: Path, *, force: bool) -> None:
    """OutputError where the dialect is only read, or saving to `path` would overwrite something without `force`."""
    check_writable(adapter, path)
    weights = destination_weights(adapter, path)
    taken = [
        p
        for p in (weights, weights.parent / CONFIG_NAME)
        if p.exists() and (p == weights or is_folder_adapter(adapter))
    ]
    if taken and not force:
        raise OutputError(f"{printable(taken[0])}: exists already; choose another output or pass --force")


def save(adapter: Adapter, path: str | os.PathLike[str], *, force: bool = False, shared: bool = False) -> Saved:
    """Write an adapter in its own dialect: a folder for PEFT with a config, one safetensors file otherwise.

    An adapter as loaded is written back tensor for tensor and field for field. Raises OutputError where the destination
    exists and `force` is not given, or cannot be written; it is then untouched. `shared` is for a folder in which
    others write at the same time: what lies there is let be, and the config goes there before the weights.
    """
    updates = ((t, e.read()) for t, e in adapter.entries.items())
    return write(adapter, updates, Path(path), force=force, shared=shared)


def write(
    adapter: Adapter, updates: Iterable[tuple[str, Update]], path: Path, *, force: bool = False, shared: bool = False
) -> Saved:
    """Stream `updates` of the targets of `adapter`, in any order, then its extras, to `path`; `shared` as `save`.

    Nothing exists at the destination before all of it does. ValueError where a target is missing.
    """
    check_destination(adapter, path, force=force)
    adapter = _with_hash_begun(adapter)
    weights = destination_weights(adapter, path)
    if not is_folder_adapter(adapter):
        with _sink(adapter, weights) as sink:
            declared = _fill(sink, adapter, updates)
            nbytes = sink.commit(_metadata(adapter, declared, placeholder=False))
        return Saved(weights, weights, nbytes, None)
    with AtomicFolder(weights.parent, shared=shared, last=weights.name) as folder:
        with SafetensorsSink(folder.temporary / weights.name, reserve=header_room(adapter), named=False) as sink:
            declared = _fill(sink, adapter, updates)
            nbytes = sink.commit(_metadata(adapter, declared, placeholder=False))
        folder.write_text(CONFIG_NAME, json.dumps(declared.config, indent=2, ensure_ascii=False) + "\n")
        folder.commit()
    return Saved(weights.parent, weights, nbytes, weights.parent / CONFIG_NAME)


@dataclass(frozen=True, eq=False)
class PackedTarget:
    """One target in codes: what it decodes to, and the tensors to store for its slots."""

    target: str
    update: Update
    contents: Mapping[str, Content]


@dataclass(frozen=True)
class PackedSize:
    """Bytes of a packed file, and those of them that are codes and scales."""

    file: int
    codes: int


def packed_place(path: Path, *, force: bool) -> Path:
    """The file that `write_packed` makes of `path`; OutputError where there is one already, unless `force`."""
    place = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")
    refuse_existing(place, force=force)
    return place


def write_packed(
    adapter: Adapter, targets: Iterable[PackedTarget], path: Path | None, *, force: bool = False
) -> PackedSize:
    """Stream targets in codes, then what belongs to none, to one file at `path`.

    The config of a folder adapter goes into the file. Without a path nothing is written, and the size is exact all the
    same. ValueError where a target is missing.
    """
    if path is not None:
        check_writable(adapter, path)
    place = None if path is None else packed_place(path, force=force)
    adapter = _with_hash_begun(adapter)
    written: dict[str, Written] = {}
    with PackedSink(place) as sink:
        for each in targets:
            for slot, content in each.contents.items():
                sink.pack(adapter.format.spell(each.target, slot), content)
            entry = entry_of(each.update)
            written[each.target] = Written(entry.rank, entry.scale, adapter.entries[each.target].alpha)
        declared = _fill_rest(sink, adapter, written)
        sink.config = declared.config
        file = sink.commit(_metadata(adapter, declared, placeholder=path is None))
        return PackedSize(file, sink.coded)


def _with_hash_begun(adapter: Adapter) -> Adapter:
    """The same adapter; the hash of its input, which its record needs last, is computed meanwhile."""
    if adapter.record is None:
        return adapter
    return replace(adapter, record=replace(adapter.record, source_sha256=begun(adapter.record.source_sha256)))


def _sink(adapter: Adapter, weights: Path) -> TensorSink:
    if adapter.format.container == "gguf":
        return GGUFSink(weights, q8=adapter.format.quantised)
    return SafetensorsSink(weights, reserve=header_room(adapter))


def _fill(sink: TensorSink, adapter: Adapter, updates: Iterable[tuple[str, Update]]) -> Declaration:
    written: dict[str, Written] = {}
    for target, update in updates:
        entry = entry_of(update)
        experts = update.layout.experts
        for slot, tensor in update.parameters().items():
            stored = packed(tensor, slot, adapter.format.packing(target, slot), experts)
            sink.write(adapter.format.spell(target, slot), stored)
        written[target] = Written(entry.rank, entry.scale, adapter.entries[target].alpha)
    return _fill_rest(sink, adapter, written)


def _fill_rest(sink: TensorSink, adapter: Adapter, written: Mapping[str, Written]) -> Declaration:
    """What goes after the updates: the numbers that the dialect keeps in tensors, and the extras."""
    if missing := [t for t in adapter.entries if t not in written]:
        raise ValueError(f"no update for {missing[0]}")
    declared = adapter.format.declare(written, adapter.metadata)
    for key, (value, spec) in declared.scalars.items():
        sink.write(key, torch.full(spec.shape, value, dtype=getattr(torch, DTYPES[spec.dtype][0])))
    for key, extra in adapter.extras.items():
        sink.write(key, extra.read())
    return declared


def header_room(adapter: Adapter) -> int:
    """Bytes that `write` keeps for the header: enough for the tensors at their present ranks or at lower ones."""
    specs = {adapter.format.spell(t, slot): spec for t, e in adapter.entries.items() for slot, spec in e.specs.items()}
    declared = adapter.format.declare(adapter.written(), adapter.metadata)
    specs |= {key: spec for key, (_, spec) in declared.scalars.items()}
    specs |= {key: extra.spec for key, extra in adapter.extras.items()}
    slack = 0 if adapter.record is None else _METADATA_SLACK
    return len(header_bytes(specs, _metadata(adapter, declared, placeholder=True))) + slack


def _metadata(adapter: Adapter, declared: Declaration, *, placeholder: bool) -> dict[str, str]:
    """Metadata as read for an adapter that nothing changed; else restated, freed of stale hashes, with one record."""
    if adapter.record is None:
        return dict(adapter.metadata)
    kept = {key: value for key, value in declared.metadata.items() if key not in adapter.format.stale}
    container = {} if declared.config is None else {"format": adapter.format.framework}  # which PEFT wants to see
    return container | kept | {RECORD_KEY: adapter.record.to_json(placeholder=placeholder)}
