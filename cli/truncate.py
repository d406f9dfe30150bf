"""`loratools truncate`."""

from __future__ import annotations

from typing import Annotated, Literal

from typer import Option

from loratools_cli import options


def truncate(
    path: options.AdapterPath,
    rank: Annotated[int, Option(metavar="N", help="How many components to keep.")],
    nested: Annotated[
        Literal["dylora", "matryoshka", "keep"],
        Option(help="How the adapter was trained, which sets the scale of what is kept."),
    ] = "keep",
    alpha: options.Alpha = None,
    enable_lora: options.EnableLora = None,
    scaling: options.Scaling = None,
    allow_unchanged: options.AllowUnchanged = False,
    output: options.OutputPath = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Keep the first components as trained.

    For nested adapters, such as DyLoRA's and MatryoshkaLoRA's. For any other, squeeze loses less at the same rank.

    Example: loratools truncate my_dylora --rank 8 --nested dylora
    """
    import loratools
    from loratools_cli.destination import destination
    from loratools_cli.opening import open_adapter
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    adapter = open_adapter(path, alpha=alpha, enable_lora=enable_lora, scaling=scaling)
    place = destination(adapter, output, f"first{rank}", force=force or dry_run)
    with Progress() as progress:
        watched = progress.watch(adapter)
        if dry_run:
            report = loratools.truncate(watched, rank, nested=nested, scaling=scaling, allow_unchanged=allow_unchanged)[
                1
            ]
        else:
            report = loratools.truncate_file(
                watched, place, rank, nested=nested, scaling=scaling, allow_unchanged=allow_unchanged, force=force
            )[1]
    shown.show(report, planned=place if dry_run else None)
