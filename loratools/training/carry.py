"""An adapter carried to another base by the weights of both, or by what both models make of some texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.base_weights import load_base
from loratools.cache import default_cache
from loratools.ops.base_spectra import Search
from loratools.ops.depth import pairings
from loratools.ops.weight_space import Align, module_pairs, transfer_weights
from loratools.training.applied import base_of
from loratools.training.models import load_model
from loratools.training.paired_activations import PairedActivations, Side, paired_texts

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.ops.weight_space import MapsOf
    from loratools.reports.weight_transfer import WeightTransferReport

Steps = Callable[[int, str], Callable[[], None]]  # (steps, of what) -> to be called after each


def carry(
    adapter: Adapter,
    source: str,
    target: str,
    *,
    align: Align = "bases",
    texts: Sequence[str] = (),
    device: str = "cpu",
    allow_download: bool = False,
    steps: Steps | None = None,
) -> tuple[Adapter, WeightTransferReport]:
    """As `transfer_weights`, of models by the places that `load_model` knows; `texts` are for "activations"."""
    maps: MapsOf | None = None
    if align == "activations":
        one, other = (
            Side(*load_model(place, device, allow_download=allow_download, dtype="float32"), Path(place).name)
            for place in (source, target)
        )
        bases = base_of(one.model), base_of(other.model)
        found = paired_texts(one, other, texts)
        maps = PairedActivations(one, other, found, module_pairs(adapter, *bases), device)
    else:
        bases = _base(source, allow_download=allow_download), _base(target, allow_download=allow_download)
    step = None if steps is None else steps(max(1, len(pairings(adapter, *bases)[0])), "modules")
    search = Search(cache=default_cache(), device=device)
    if maps is not None:
        return transfer_weights(adapter, *bases, maps=maps, search=search, step=step)
    return transfer_weights(adapter, *bases, maps="none" if align == "none" else "bases", search=search, step=step)


def _base(place: str, *, allow_download: bool) -> BaseWeights:
    """Weights by the names that transformers gives them: from a folder one at a time, else from the whole model."""
    path = Path(place)
    if path.exists() and path.suffix != ".gguf":
        return load_base(path)
    return base_of(load_model(place, allow_download=allow_download)[0])
