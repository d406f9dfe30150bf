"""`loratools diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loratools_cli import options


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The adapter that errors are relative to.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The adapter to compare with it.")],
    base: options.Base = None,
    tolerance: Annotated[
        float, typer.Option(metavar="T", help="Relative error of each target that counts as the same.")
    ] = 1e-6,
    alpha: options.Alpha = None,
    enable_lora: options.EnableLora = None,
    scaling: options.Scaling = None,
    device: options.Device = "cpu",
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing: the exit status answers.")] = False,
) -> None:
    """Compare what two adapters do.

    Compares the updates, never their factors. Exit status 0: the same, 1: different.

    Example: loratools diff my_lora.safetensors my_lora.r8.safetensors --tolerance 0.05
    """
    import loratools
    from loratools_cli.exit_codes import ExitCode
    from loratools_cli.opening import open_adapter, open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    options.check_device(device)
    weights = open_base(base)
    first, second = (
        open_adapter(path, alpha=alpha, enable_lora=enable_lora, scaling=scaling, base=weights) for path in (a, b)
    )
    with Progress() as progress:
        pair = progress.watch(first), progress.watch(second)
        report = loratools.diff(*pair, base=weights, tolerance=tolerance, device=device)
    shown.show(report)
    if not report.same:
        raise typer.Exit(ExitCode.DIFFERENT)
