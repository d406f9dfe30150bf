"""`loratools hub similar`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from loratools_cli import options


def similar(
    path: Annotated[Path, Argument(metavar="HUB", help="Folder with adapters in it, at any depth.")],
    to: Annotated[
        Path | None, Option(metavar="ADAPTER", help="Rank the hub by its likeness to this adapter instead.")
    ] = None,
    threshold: Annotated[float, Option(metavar="C", help="The least cosine of whole deltas that counts.")] = 0.95,
    nearest: Annotated[int, Option(metavar="N", help="With --to: tell so many.")] = 20,
    catalog: Annotated[
        Path | None, Option(metavar="FILE", help="What hub catalog wrote of the hub, so that nothing is sketched anew.")
    ] = None,
    workers: Annotated[int, Option(metavar="N", help="Processes, which share the cores.")] = 1,
    table: options.TablePath = None,
    force: Annotated[bool, Option("--force", help="Replace an existing table.")] = False,
    everything: Annotated[bool, Option("--all", help="Show every row, not a summary.")] = False,
    as_json: options.Json = False,
) -> None:
    """Find copies, derivatives and merges in a hub.

    Compares deltas, whatever the factors, rank, family and dialect, and tells exact cosines. Clusters are what pairs
    over the threshold connect. Families that need the base are left out, but for files of the same bytes.

    \b
    Examples:
      loratools hub similar adapters/ --threshold 0.9 --workers 2
      loratools hub similar adapters/ --to my_lora.safetensors
    """
    from loratools.hub.similar import Similar
    from loratools.hub.similar import similar as find_similar
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, everything=everything)
    check_exports(table=table, force=force)
    how = Similar(threshold, to, nearest, catalog, workers)
    with Progress() as progress:
        report = find_similar(path, how, steps=progress.steps)
    write_exports(report, table=table, force=force)
    shown.show(report)
