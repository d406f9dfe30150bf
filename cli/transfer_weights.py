"""`loratools transfer --weights-only`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
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
    from loratools.errors import UsageError
    from loratools.storage.atomic import refuse_existing
    from loratools.training.carry import carry
    from loratools.training.texts import read_texts
    from loratools_cli.opening import open_adapter
    from loratools_cli.progress import Progress

    if (align == "activations") != (texts is not None):
        raise UsageError("--align activations runs some --texts; give both, or neither")
    refuse_existing(output, force=force)
    adapter = open_adapter(path)
    rows = [] if texts is None else read_texts(texts)
    with Progress() as progress:
        made, report = carry(
            adapter,
            source,
            target,
            align=align,
            texts=rows,
            device=device,
            allow_download=allow_download,
            steps=progress.steps,
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
