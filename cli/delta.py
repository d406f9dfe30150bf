"""`loratools delta`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from loratools_cli import options


def delta(
    path: options.AdapterPath,
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="The safetensors file to write.")],
    base: options.Base = None,
    target: options.Target = None,
    alpha: options.Alpha = None,
    snell_threshold: options.SnellThreshold = None,
    enable_lora: options.EnableLora = None,
    scaling: options.Scaling = None,
    force: Annotated[bool, Option("--force", help="Replace an existing output.")] = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the dense weight changes.

    In float32, and under the base model's own names where --base is given.

    Example: loratools delta my_lora.safetensors --target 'q_proj' -o deltas.safetensors
    """
    import loratools
    from loratools_cli.opening import open_adapter, open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    weights = open_base(base)
    adapter = open_adapter(
        path, alpha=alpha, enable_lora=enable_lora, scaling=scaling, base=weights, thresholds=snell_threshold
    )
    with Progress() as progress:
        report = loratools.delta_file(progress.watch(adapter), output, base=weights, target=target, force=force)
    shown.show(report)
