"""`loratools intruders`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from loratools_cli import options


def intruders(
    base: Annotated[Path, Argument(metavar="BASE", help="Base model: its folder, index or weights file.")],
    path: Annotated[
        Path, Argument(metavar="ADAPTER", help="Adapter: a weights file, or a folder with one. Or the tuned model.")
    ],
    top_k: Annotated[int, Option(metavar="K", help="How many leading singular vectors to look at.")] = 10,
    epsilon: Annotated[float, Option(metavar="E", help="Intruders have no cosine of E with any vector.")] = 0.5,
    target: options.Target = None,
    sweep: Annotated[bool, Option("--sweep", help="Count at thresholds from 0.1 to 0.9 too.")] = False,
    mitigate: Annotated[
        float | None, Option(metavar="X", help="Write the adapter with intruders at X times their value.")
    ] = None,
    keep_rank: Annotated[
        bool, Option("--keep-rank", help="Mitigate at the old rank, as PEFT does: not exactly.")
    ] = False,
    method: options.VerdictMethod = "auto",
    cached: options.Cached = True,
    device: options.Device = "cpu",
    figure: options.FigurePath = None,
    table: options.TablePath = None,
    alpha: options.Alpha = None,
    initial_adapter: options.InitialAdapter = None,
    output: options.OutputPath = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find singular vectors that the base model does not have.

    Of W0 + delta, for every matrix: the leading ones that are like none of W0. Few singular vectors of full fine-tuning
    are; see docs/guide.md for what that may mean, and what not.

    \b
    Examples:
      loratools intruders llama my_adapter --sweep --table intruders.csv
      loratools intruders llama my_adapter --mitigate 0.75 -o calmer
    """
    from dataclasses import replace

    import loratools
    from loratools.errors import UsageError
    from loratools.files import save
    from loratools_cli.destination import destination
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.opening import open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    if mitigate is None and (output or keep_rank):
        raise UsageError("-o and --keep-rank go with --mitigate X, which writes an adapter")
    if mitigate is not None and target is not None:
        raise UsageError("--mitigate works on all targets; leave --target out")
    options.check_device(device)
    check_exports(figure=figure, table=table, force=force or dry_run)
    weights = open_base(base)
    assert weights is not None
    search = loratools.Search(method, loratools.default_cache() if cached else None, device)
    with Progress() as progress:
        opened = loratools.open_fine_tune(path, weights, alpha=alpha, initial=initial_adapter, steps=progress.steps)
        if mitigate is not None and opened.kind == "full":
            raise UsageError(f"{path}: is a whole model; --mitigate is for adapters: make one with loratools extract")
        adapter = opened.adapter
        step = progress.steps(len(adapter.select(target) if target else adapter), "targets examined")
        if mitigate is None:
            place = None
            report = loratools.intruders(
                adapter,
                weights,
                target=target,
                sweep=sweep,
                top_k=top_k,
                epsilon=epsilon,
                search=search,
                step=step,
            )
        else:
            place = destination(adapter, output, "calmer", force=force or dry_run)
            result, report = loratools.mitigate(
                adapter, weights, mitigate, keep_rank=keep_rank, top_k=top_k, epsilon=epsilon, search=search, step=step
            )
            if not dry_run:
                report = replace(report, output=str(save(result, place, force=force).path))
    if not dry_run:
        write_exports(report, figure=figure, table=table, force=force)
    shown.show(report, planned=place if dry_run else None)
