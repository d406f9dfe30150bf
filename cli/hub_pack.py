"""`loratools hub pack`, `unpack` and `pack-add`: many adapters in one folder that share bases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from loratools_cli import options

PackPath = Annotated[Path, Argument(metavar="PACK", help="What hub pack wrote.")]


def pack(
    path: Annotated[Path, Argument(metavar="HUB", help="Folder with adapters in it, at any depth.")],
    output: Annotated[Path, Option("--output", "-o", metavar="PACK", help="The folder to write.")],
    budget: Annotated[
        str, Option(metavar="SIZE", help="Of all files together: a share of the hub's bytes, or a size such as 12MB.")
    ] = "20%",
    method: Annotated[
        Literal["auto", "own", "joint", "cluster", "diag", "sparse", "atoms"],
        Option(help="One way for all targets; auto: whatever errs least, target by target."),
    ] = "auto",
    bits: Annotated[
        Literal["none", "8", "4"], Option(help="Of bases, cores and components; none: the dtype of the adapters.")
    ] = "none",
    seed: Annotated[int, Option(metavar="N", help="Of what is drawn at random: where clusters begin.")] = 0,
    table: options.TablePath = None,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Pack a hub: what adapters have in common is stored once.

    Of every target some adapters share bases (joint: U S V^T with a small S for each; cluster: several U and V; diag:
    S is a diagonal; sparse: with few entries; atoms: S is a mix of a few), others keep singular components of their
    own, and some do both. Bytes go where they lower the sum of the squared relative errors of all adapters most. What
    has no factors is stored as it is; an adapter that cannot be packed is a row, and exit code 3.

    Example: loratools hub pack adapters/ -o pack/ --budget 20%
    """
    from loratools.hub.pack import Packing
    from loratools.hub.pack import pack as pack_all
    from loratools_cli.exit_codes import ExitCode
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    check_exports(table=table, force=force)
    how = Packing(budget, method, 0 if bits == "none" else int(bits), seed)
    with Progress() as progress:
        report = pack_all(path, output, how, force=force, steps=progress.steps)
    write_exports(report, table=table, force=force)
    shown.show(report)
    if report.failed:
        raise typer.Exit(ExitCode.INPUT)


def unpack(
    path: PackPath,
    name: Annotated[str, Argument(metavar="NAME", help="Of an adapter, as it was called in the hub.")],
    output: Annotated[Path, Option("--output", "-o", metavar="PATH", help="Where to write it.")],
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write one adapter of a pack, in the dialect that it had.

    Example: loratools hub unpack pack/ alpaca -o alpaca-small/
    """
    from loratools.hub.pack import unpack as unpack_one
    from loratools_cli.output import Output

    shown = Output(as_json=as_json, quiet=quiet)
    shown.show(unpack_one(path, name, output, force=force))


def pack_add(
    path: PackPath,
    adapter: options.AdapterPath,
    name: Annotated[
        str | None, Option(metavar="NAME", help="What to call it; as its file or folder, if not given.")
    ] = None,
    budget: Annotated[
        str | None,
        Option(metavar="SIZE", help="Of its own file: a share of its bytes now, or a size such as 1MB."),
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace the adapter of that name.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Let an adapter join a pack, whose bases stay as they are.

    It gets the best coefficients on them, or components of its own where these err less for the same bytes. With
    --budget it gets whatever of both takes most off its error within so many bytes.

    \b
    Examples:
      loratools hub pack-add pack/ new-adapter/
      loratools hub pack-add pack/ new-adapter/ --budget 30%
    """
    from loratools.hub.pack import add
    from loratools_cli.output import Output

    shown = Output(as_json=as_json, quiet=quiet)
    shown.show(add(path, adapter, name=name, budget=budget, force=force))
