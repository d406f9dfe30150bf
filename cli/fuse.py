"""`loratools fuse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from loratools_cli import options


def fuse(
    base: Annotated[Path, Argument(metavar="BASE", help="Base model: its folder, index or weights file.")],
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="Adapter: a weights file, or a folder with one.")],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="The folder to write.")],
    alpha: options.Alpha = None,
    snell_threshold: options.SnellThreshold = None,
    enable_lora: options.EnableLora = None,
    scaling: options.Scaling = None,
    initial_adapter: options.InitialAdapter = None,
    force: Annotated[bool, Option("--force", help="Replace files of an existing output.")] = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the base model with an adapter added to its weights.

    In the base's own files, names and dtypes, one parameter at a time, with its config and tokenizer. What rounding to
    those dtypes takes away from the update is reported.

    Example: loratools fuse llama my_adapter -o llama-with-my-adapter
    """
    import loratools
    from loratools_cli.opening import open_adapter
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    weights = loratools.load_base(base)
    opened = open_adapter(
        adapter,
        alpha=alpha,
        enable_lora=enable_lora,
        scaling=scaling,
        initial=initial_adapter,
        base=weights,
        thresholds=snell_threshold,
    )
    with Progress() as progress:
        report = loratools.fuse(progress.watch(opened), weights, output, force=force)
    shown.show(report)
