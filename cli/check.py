"""`loratools check`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from typer import Option

from loratools_cli import options


def check(
    path: options.AdapterPath,
    server: Annotated[
        Literal["vllm", "sglang", "slora", "llamacpp", "peft", "diffusers", "comfy"],
        Option("--for", help="Where it is to be loaded."),
    ],
    fix: Annotated[bool, Option("--fix", help="Write the adapter as the server takes it, to -o.")] = False,
    exact: Annotated[
        bool, Option("--exact", help="With --fix: write families that it lacks as the LoRA that they are exactly.")
    ] = False,
    rank: Annotated[
        int | None, Option(metavar="N", help="With --fix: approximate families that it lacks at rank N.")
    ] = None,
    drop: Annotated[
        list[str] | None,
        Option(metavar="KIND", help="With --fix, leave out: bias, extras, unsupported or unmapped."),
    ] = None,
    base: options.Base = None,
    initial_adapter: options.InitialAdapter = None,
    alpha: options.Alpha = None,
    output: options.OutputPath = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Tell whether a server takes an adapter, and what helps.

    Reads headers alone; exits with 4 where the server refuses it or computes another delta.

    \b
    Examples:
      loratools check my_adapter --for vllm
      loratools check my_adapter --for vllm --fix -o served
    """
    import loratools
    from loratools.errors import UsageError
    from loratools.ops.check import fitted, write_fitted
    from loratools.ops.convert import DROPPABLE, Convert
    from loratools.ops.lowering import Lowering
    from loratools_cli.destination import destination
    from loratools_cli.exit_codes import ExitCode
    from loratools_cli.opening import open_adapter, open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    if unknown := [kind for kind in drop or [] if kind not in DROPPABLE]:
        raise UsageError(f"--drop {unknown[0]}: what can be dropped is {', '.join(DROPPABLE)}")
    if not fix and (output or drop or exact or rank is not None):
        raise UsageError("-o, --drop, --exact and --rank say how to fix; give --fix with them")
    weights = open_base(base)
    adapter = open_adapter(path, alpha=alpha, initial=initial_adapter, base=weights)
    if not fix:
        report = loratools.check(adapter, server)
        shown.show(report)
        if not report.loads:
            raise typer.Exit(ExitCode.ADAPTER)
        return
    how = Convert(lowering=Lowering(exact, rank), drop=frozenset(drop or ()), base=weights)
    with Progress() as progress:
        watched = progress.watch(adapter)
        result, converted = fitted(watched, server, how)
        place = destination(result, output, server, force=force or dry_run)
        report = loratools.check(result, server)
        if not dry_run:
            report = write_fitted(result, converted, place, server, force=force)
    shown.show(report, planned=place if dry_run else None)
