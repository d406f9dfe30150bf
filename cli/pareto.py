"""`loratools pareto`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from loratools_cli import options


def pareto(
    path: options.AdapterPath,
    methods: Annotated[
        str | None, Option(metavar="LIST", help="Only these, such as grid,svd,rtn; all of them by default.")
    ] = None,
    alpha: options.Alpha = None,
    enable_lora: options.EnableLora = None,
    scaling: options.Scaling = None,
    figure: options.FigurePath = None,
    table: options.TablePath = None,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show how small an adapter can be made, and at what loss.

    Every method at every setting: the bytes of the file that it would write, the relative error of the whole delta, and
    the command that makes the file. Shown are the settings that no other beats; all with --all.

    \b
    Examples:
      loratools pareto my_lora.safetensors --plot curves.png
      loratools pareto my_peft_folder --methods grid,svd,rtn --table curves.csv
    """
    import loratools
    from loratools.ops.pareto import METHODS
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.opening import open_adapter
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    check_exports(figure=figure, table=table, force=force)
    chosen = METHODS if methods is None else tuple(m.strip() for m in methods.split(",") if m.strip())
    adapter = open_adapter(path, alpha=alpha, enable_lora=enable_lora, scaling=scaling)
    with Progress() as progress:
        report = loratools.pareto(adapter, chosen, steps=progress.steps)
    write_exports(report, figure=figure, table=table, force=force)
    shown.show(report)
