"""A fine-tune of a base model, whatever it was saved as: an adapter, or the whole model that was tuned."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loratools.base_weights import load_base
from loratools.configs import CONFIG_NAME
from loratools.errors import InputError, UnchangedError, UsageError
from loratools.families.full import Full
from loratools.files import load
from loratools.ops.extract import Differences, differences
from loratools.ops.initial import subtract_initial
from loratools.storage import open_source
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights

Kind = Literal["adapter", "full"]
Steps = Callable[[int, str], Callable[[], None]]

_OF_ADAPTERS = (".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight")
_LOOKED_AT = 256  # names that tell an adapter from a model: a model of experts has tens of thousands of them


@dataclass(frozen=True, eq=False)
class FineTuneSource:
    """Updates of a base, and what kind of fine-tune they come from; of a whole model, lazy full differences.

    `left_out` is what a whole model changed that is no matrix: parameter -> ||change|| / ||base||. `differences` are
    what the updates of a whole model were made of.
    """

    path: Path
    kind: Kind
    adapter: Adapter
    left_out: Mapping[str, float] = field(default_factory=dict)
    differences: Differences | None = None


def open_fine_tune(
    path: str | os.PathLike[str],
    base: BaseWeights,
    *,
    alpha: float | None = None,
    initial: str | os.PathLike[str] | None = None,
    steps: Steps | None = None,
) -> FineTuneSource:
    """The fine-tune of `base` at `path`: a whole model where most tensor names are the base's own, else an adapter.

    The header alone decides, and an adapter_config.json beside it for an adapter; one of whole layers and nothing else,
    as MLX-LM saves them, is a whole model all the same. A whole model is then read once, for what it changed:
    `steps(total, what)` gives what to call after each parameter. `alpha` and `initial`, the factors before training,
    are for adapters. Raises UnchangedError for a model that is the base, UsageError for a base that is an adapter and
    for `initial` beside a whole model, InputError for what is neither, and whatever `load` and `differences` raise.
    """
    place = Path(path)
    if any(name.endswith(_OF_ADAPTERS) for name in base.source.specs):
        raise UsageError(
            f"{printable(base.source.path)}: is an adapter where the base model belongs; give the model first"
        )
    stated = ((place if place.is_dir() else place.parent) / CONFIG_NAME).is_file()  # that an adapter lies here
    known, total = (0, 0) if stated else _known_names(place, base)
    if known * 2 > total:
        return _whole_model(place, base, initial, steps)
    try:
        adapter = load(place, alpha=alpha, base=base)
    except InputError as error:
        if not total:
            raise
        missing = f"no fine-tune of {printable(base.source.path)} either, whose parameters it lacks"
        raise InputError(f"{error}; {missing}: name an adapter, or a model of that base") from error
    if not adapter.entries and adapter.origin is not None and adapter.format.replacements():
        return _whole_model(adapter.origin.path, base, initial, steps)  # layers that MLX-LM tuned whole
    if initial is not None:
        adapter = subtract_initial(adapter, load(initial, base=base))
    adapter.require_weights()
    return FineTuneSource(place, kind_of(adapter), adapter)


def fine_tune_of(adapter: Adapter) -> FineTuneSource:
    """An adapter at hand, such as that of `differences`, as a fine-tune."""
    return FineTuneSource(adapter.origin.path if adapter.origin else Path("memory"), kind_of(adapter), adapter)


def kind_of(adapter: Adapter) -> Kind:
    """Whether updates are those of a model that was tuned whole: full differences and nothing else."""
    families = {entry.family for entry in adapter.entries.values()}
    return "full" if families == {Full} else "adapter"


def names_of(paths: Sequence[Path]) -> tuple[str, ...]:
    """One name for each path: that of its folder, or of its file, with as many folders before it as tell them apart.

    UsageError where two are one place.
    """
    places = [path.resolve() for path in paths]
    if len(set(places)) < len(places):
        twice = next(path for i, path in enumerate(paths) if places[i] in places[:i])
        raise UsageError(f"{printable(twice)}: is given twice; name each fine-tune once")
    parts = [(*place.parts[:-1], _stem(place)) for place in places]
    parts = [path[:-1] if path[-1] in _SAY_NOTHING and len(path) > 2 else path for path in parts]
    depths = [1] * len(parts)
    while True:
        names = ["/".join(path[-depth:]) for path, depth in zip(parts, depths, strict=True)]
        again = [names.count(name) > 1 and depths[i] < len(parts[i]) for i, name in enumerate(names)]
        if not any(again):
            break
        depths = [depth + more for depth, more in zip(depths, again, strict=True)]
    # a folder and the file in it, or two files of one stem, are told apart by nothing but their number
    return tuple(name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names))


_SAY_NOTHING = frozenset({"adapter_model", "adapter", "adapters", "model", "pytorch_model", "pytorch_adapter"})
_SUFFIXES = (".safetensors.index.json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".lora")


def _stem(place: Path) -> str:
    if place.is_dir():
        return place.name
    return next((place.name.removesuffix(s) for s in _SUFFIXES if place.name.endswith(s)), place.name)


def _known_names(place: Path, base: BaseWeights) -> tuple[int, int]:
    """How many of the names that were looked at are parameters of the base, and how many were."""
    try:
        source = open_source(place)
    except InputError:  # several files, or none that it knows: an adapter's names for them are known to `load`
        return 0, 0
    with source:
        names = list(source.specs)
    names = names[:: max(1, len(names) // _LOOKED_AT)]
    return sum(base.name_of(name) is not None for name in names), len(names)


def _whole_model(
    place: Path, base: BaseWeights, initial: str | os.PathLike[str] | None, steps: Steps | None
) -> FineTuneSource:
    if initial is not None:
        raise UsageError(f"{printable(place)}: is a whole model, which has no initial factors to subtract")
    tuned = load_base(place)
    step = None if steps is None else steps(len(tuned.source.specs), "parameters compared")
    found = differences(base, tuned, step=step)
    if not found.adapter.entries:
        raise UnchangedError(f"{printable(place)}: no matrix differs from {printable(base.source.path)}")
    warnings = found.adapter.warnings
    if found.reordered:
        note = f"the channels of {len(found.reordered)} parameters lay in another order and were put back"
        warnings = (*warnings, f"{note}; first: {found.reordered[0]}")
    left_out = {name: change.relative for name, change in found.left_out.items()}
    found = replace(found, adapter=replace(found.adapter, warnings=warnings))
    return FineTuneSource(place, "full", found.adapter, left_out, found)
