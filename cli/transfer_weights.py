"""`loratools transfer --weights-only`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from loratools.base_weights import BaseWeights
    from loratools.reports.weight_transfer import WeightTransferReport

Align = Literal["none", "bases", "activations"]


def transfer_weights(
    path: Path,
    source: str,
    target: str,
    output: Path,
    *,
    align: Align,
    texts: Path | None,
    device: str,
    allow_download: bool,
    force: bool,
) -> WeightTransferReport:
    """Carry an adapter over by the weights of two bases, or by what both make of some texts, and write it."""
    import loratools
    from loratools.cache import default_cache
    from loratools.errors import UsageError
    from loratools.ops.base_spectra import Search
    from loratools.ops.depth import pairings
    from loratools.ops.weight_space import module_pairs
    from loratools.ops.weight_space import transfer_weights as carried
    from loratools.storage.atomic import refuse_existing
    from loratools.training.applied import base_of
    from loratools.training.models import load_model
    from loratools.training.paired_activations import PairedActivations, Side, paired_texts
    from loratools.training.texts import read_texts
    from loratools_cli.opening import open_adapter
    from loratools_cli.progress import Progress

    if (align == "activations") != (texts is not None):
        raise UsageError("--align activations runs some --texts; give both, or neither")
    refuse_existing(output, force=force)
    adapter = open_adapter(path)
    rows = [] if texts is None else read_texts(texts)
    with Progress() as progress:
        if align == "activations":
            one, other = (
                Side(*load_model(place, device, allow_download=allow_download, dtype="float32"), Path(place).name)
                for place in (source, target)
            )
            bases = base_of(one.model), base_of(other.model)
            found = paired_texts(one, other, rows)
            maps = PairedActivations(one, other, found, module_pairs(adapter, *bases), device)
        else:
            bases = (
                _base(source, allow_download=allow_download),
                _base(target, allow_download=allow_download),
            )
        step = progress.steps(max(1, len(pairings(adapter, *bases)[0])), "modules")
        search = Search(cache=default_cache(), device=device)
        made, report = carried(
            adapter, *bases, maps=maps if align == "activations" else align, search=search, step=step
        )
    saved = loratools.save(made, output, force=force)
    return replace(
        report,
        output=str(saved.path),
        bytes=saved.nbytes,
        adapter=str(path),
        source=source,
        destination=target,
    )


def _base(place: str, *, allow_download: bool) -> BaseWeights:
    """Weights by the names that transformers gives them: from a folder one at a time, else from the whole model."""
    import loratools
    from loratools.training.applied import base_of
    from loratools.training.models import load_model

    path = Path(place)
    if path.exists() and path.suffix != ".gguf":
        return loratools.load_base(path)
    return base_of(load_model(place, allow_download=allow_download)[0])
