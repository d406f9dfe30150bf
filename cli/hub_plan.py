"""`loratools hub plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from loratools_cli import options


def plan(
    path: Annotated[Path, Argument(metavar="HUB|CATALOG", help="Folder with adapters in it, or a catalog of one.")],
    server: Annotated[Literal["slora", "vllm"], Option(help="Which server is to hold them.")],
    memory: Annotated[str, Option(metavar="SIZE", help="For adapters, and for the cache of S-LoRA: 20GB, 16GiB.")],
    popularity: Annotated[
        Path | None, Option(metavar="CSV", help="Lines of name,count, or of a name for each request.")
    ] = None,
    base: Annotated[
        str | None, Option(metavar="GLOB", help="Base model to plan for, instead of that of most adapters.")
    ] = None,
    buckets: Annotated[int, Option(metavar="N", help="Ranks at which to serve, at most; for vLLM, servers.")] = 4,
    by_popularity: Annotated[
        bool, Option("--by-popularity", help="Choose ranks by the padding of requests, not of adapters.")
    ] = False,
    max_error: Annotated[
        float | None,
        Option("--max-error", metavar="E", help="Squeeze where the catalog says that no more is lost."),
    ] = None,
    reserve_tokens: Annotated[
        int, Option("--reserve-tokens", metavar="N", help="Cells of S-LoRA that the cache keeps.")
    ] = 0,
    requests: Annotated[int, Option(metavar="N", help="Length of the simulated trace.")] = 100_000,
    zipf: Annotated[float, Option(metavar="S", help="Exponent of the popularity without a log; 0: all alike.")] = 1.0,
    seed: Annotated[int, Option(metavar="N", help="Of the trace, and of who is popular without a log.")] = 0,
    hub: Annotated[
        Path | None, Option("--hub", metavar="FOLDER", help="What a catalog is of, for the commands to run.")
    ] = None,
    lists: Annotated[
        Path | None, Option("--lists", metavar="FOLDER", help="Write the names that commands are for, a file for each.")
    ] = None,
    table: options.TablePath = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Plan how S-LoRA or vLLM is to serve a hub.

    Ranks to serve at, who stays in memory, hit rates and what to run. Reads headers, or a catalog alone; changes
    nothing. Adapters that the server cannot take are counted with the reason; --table has a row for each. Commands that
    are for some adapters read their names from the files of --lists, unless these are few.

    \b
    Example: loratools hub plan adapters/ --server slora --memory 20GB
    """
    from loratools.hub.plan import Plan
    from loratools.hub.plan import plan as plan_all
    from loratools.hub.plan_commands import write_lists
    from loratools.sizes import parse_size
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet)
    check_exports(table=table, force=force)
    how = Plan(
        server, parse_size(memory), buckets, base, popularity, by_popularity, max_error,
        reserve_tokens, requests, zipf, seed, hub, lists,
    )  # fmt: skip
    with Progress() as progress:
        report = plan_all(path, how, steps=progress.steps)
    write_exports(report, table=table, force=force)
    if lists is not None:
        write_lists(report.groups, lists, force=force)
    shown.show(report)
