"""`loratools bakeoff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from loratools_cli import options


def bakeoff(
    path: options.AdapterPath,
    base: Annotated[
        Path | None, Argument(metavar="BASE", help="Base model, for the families that are fitted to it.")
    ] = None,
    budget: Annotated[
        str | None,
        Option(metavar="LIST", help="Sizes of a file of the chosen targets, such as 64KB,256KB,1MB; parts by default."),
    ] = None,
    families: Annotated[
        str | None, Option(metavar="LIST", help="Only these, such as lora,ldu,shira; all of them by default.")
    ] = None,
    target: options.Target = None,
    sample: Annotated[int, Option(metavar="N", help="So many targets, evenly spread; 0 for all.")] = 8,
    dtype: Annotated[Literal["f32", "f16", "bf16"] | None, Option(help="Of stored numbers.")] = None,
    seed: Annotated[int, Option(metavar="N", help="For random bases and restarts.")] = 0,
    alpha: options.Alpha = None,
    enable_lora: options.EnableLora = None,
    figure: options.FigurePath = None,
    table: options.TablePath = None,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Put the deltas through every family, at equal bytes.

    What each keeps of them in a file of each size, header included, and the rank of the result. The command of the best
    is shown; that of each with --all.

    \b
    Examples:
      loratools bakeoff my_lora.safetensors --plot families.png
      loratools bakeoff my_peft_folder llama --budget 64KB,1MB
    """
    import loratools
    from loratools.rank_choice import RankChoice
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.opening import open_adapter, open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    check_exports(figure=figure, table=table, force=force)
    held = open_base(base)
    adapter = open_adapter(path, alpha=alpha, enable_lora=enable_lora, base=held)
    how = loratools.Bakeoff(
        tuple(_listed(families)),
        tuple(RankChoice(budget=size).bytes(adapter.file_nbytes) for size in _listed(budget)),
        target,
        sample,
        held,
        dtype,
        seed,
    )
    with Progress() as progress:
        report = loratools.bakeoff(adapter, how, steps=progress.steps)
    write_exports(report, figure=figure, table=table, force=force)
    shown.show(report)


def _listed(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]
