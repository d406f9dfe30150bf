"""`loratools calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from loratools_cli import options


def calibrate(
    base: Annotated[Path, Argument(metavar="BASE", help="Base model: a Hugging Face folder.")],
    path: options.AdapterPath,
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="The safetensors file to write.")],
    data: Annotated[
        Path | None,
        Option(metavar="FILE", help="Texts: .jsonl rows with text, or prompt and answer; or lines of .txt."),
    ] = None,
    data_free: Annotated[
        bool, Option("--data-free", help="Estimate from the gains of the base's norms; nothing is run.")
    ] = False,
    bare: Annotated[
        bool, Option("--bare", help="Run the model as it is: it is fused with the adapter already.")
    ] = False,
    max_texts: Annotated[int, Option(metavar="N", help="Use the first N texts.")] = 256,
    max_tokens: Annotated[int, Option(metavar="N", help="Use the first N tokens of each.")] = 512,
    batch: Annotated[int, Option(metavar="N", help="Texts at once.")] = 8,
    device: options.Device = "cpu",
    alpha: options.Alpha = None,
    enable_lora: options.EnableLora = None,
    scaling: options.Scaling = None,
    force: Annotated[bool, Option("--force", help="Replace an existing output.")] = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what enters each target, for squeeze --weights.

    One pass of some texts through the base with the adapter sums a small moment for each target; the file goes with
    this very adapter. Needs loratools[models], but for --data-free.

    \b
    Examples:
      loratools calibrate base my_lora --data texts.jsonl -o stats.safetensors
      loratools squeeze my_lora --rank 8 --weights stats.safetensors
    """
    from loratools.errors import UsageError
    from loratools.storage.atomic import refuse_existing
    from loratools.training.calibrate import Calibrate, n_batches, summarised
    from loratools.training.calibrate import calibrate as calibrated
    from loratools.training.data_free import data_free_statistics
    from loratools.training.texts import read_texts
    from loratools_cli.opening import open_adapter, open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    if (data is None) != data_free:
        raise UsageError("give --data with texts to run, or --data-free, one of the two")
    if bare and data_free:
        raise UsageError("--data-free runs no model; --bare goes with --data")
    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    options.check_device(device)
    refuse_existing(output, force=force)
    how = Calibrate(max_texts, max_tokens, batch, device, bare)
    weights = open_base(base) if data_free else None
    adapter = open_adapter(path, alpha=alpha, enable_lora=enable_lora, scaling=scaling, base=weights)
    texts = [] if data is None else read_texts(data, max_texts)
    with Progress() as progress:
        if weights is not None:
            found = data_free_statistics(weights, progress.watch(adapter))
        else:
            step = progress.steps(n_batches(len(texts), how), "batches")
            found = calibrated(base, adapter, texts, options=how, step=step)
    place = found.save(output, force=force)
    shown.show(summarised(found, texts=len(texts), output=place, bare=bare))
