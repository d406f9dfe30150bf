"""`loratools hub`: many adapters at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from loratools_cli import options
from loratools_cli.hub_mixture import mixture
from loratools_cli.hub_pack import pack, pack_add, unpack
from loratools_cli.hub_plan import plan
from loratools_cli.hub_route import route, route_fit
from loratools_cli.hub_similar import similar

if TYPE_CHECKING:
    from loratools.hub.recipe import Recipe
    from loratools.storage.places import Place

hub = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Work on a whole folder of adapters, and lose nothing."
)
HubPlace = Annotated[str, Argument(metavar="HUB", help="Folder with adapters in it, at any depth, or its URL.")]
HubPath = Annotated[Path, Argument(metavar="HUB", help="Folder with adapters in it, at any depth.")]


@hub.command()
def ls(
    place: HubPlace,
    table: options.TablePath = None,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List the adapters of a hub, or of a pack, from their headers.

    Example: loratools hub ls adapters/
    """
    from loratools.hub.listing import listed
    from loratools.storage.places import parse_place
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.output import Output

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    check_exports(table=table, force=force)
    report = listed(parse_place(place))
    write_exports(report, table=table, force=force)
    shown.show(report)


@hub.command()
def run(
    places: Annotated[
        list[str],
        Argument(
            metavar="[RECIPE] HUB OUT",
            help="Recipe as a TOML file, unless --step says it all; then folders, or URLs such as s3://bucket/folder.",
        ),
    ],
    step: Annotated[
        list[str] | None, Option(metavar="STEP", help="A verb with options, such as 'squeeze rank=8'; repeated.")
    ] = None,
    workers: Annotated[int, Option(metavar="N", help="Processes, which share the cores.")] = 1,
    shard: Annotated[str, Option(metavar="I/N", help="Only the I-th of N parts, for several machines.")] = "1/1",
    only: Annotated[
        list[str] | None, Option(metavar="GLOB", help="Only adapters of such names, such as 'law/*'; repeated.")
    ] = None,
    only_from: Annotated[
        Path | None, Option("--only-from", metavar="FILE", help="Only those that the file names, one name a line.")
    ] = None,
    engine: Annotated[Literal["local", "dask"], Option(help="Where: this machine, or a Dask cluster.")] = "local",
    scheduler: Annotated[str | None, Option(metavar="URL", help="Of the cluster, such as tcp://host:8786.")] = None,
    resume: Annotated[bool, Option("--resume", help="Do what is missing, changed or stale.")] = False,
    force: Annotated[bool, Option("--force", help="Do everything again.")] = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Put every adapter of a hub through a recipe.

    Steps are squeeze, truncate, convert, reparameterize and quantize, with the options of these commands; quantize goes
    last. Outputs appear whole, each with a receipt in OUT/.loratools; what fails is a row, and exit code 3.

    \b
    Examples:
      loratools hub run adapters/ small/ --step "squeeze rank=8" --workers 2
      loratools hub run recipe.toml adapters/ small/ --resume
      loratools hub run recipe.toml adapters/ small/ --only 'law/*'
      loratools hub run recipe.toml s3://bucket/adapters s3://bucket/small
    """
    from loratools.errors import UsageError
    from loratools.hub.engines import dask_executor
    from loratools.hub.only import only_of
    from loratools.hub.run import Run
    from loratools.hub.run import run as run_all
    from loratools_cli.exit_codes import ExitCode
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    recipe, source, out = _recipe_and_places(places, step or [])
    if (engine == "dask") != (scheduler is not None):
        raise UsageError("--engine dask and --scheduler URL go together")
    executor = None if scheduler is None else lambda: dask_executor(scheduler)
    how = Run(workers, _shard(shard), resume, force, executor, only_of(only or [], only_from))
    with Progress() as progress:
        report = run_all(recipe, source, out, how, steps=progress.steps)
    shown.show(report)
    if report.counts.get("failed"):
        raise typer.Exit(ExitCode.INPUT)


@hub.command()
def status(
    place: Annotated[str, Argument(metavar="OUT", help="What hub run writes to.")],
    table: options.TablePath = None,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Tell how far a run has come, from its receipts.

    Example: loratools hub status small/
    """
    from loratools.hub.listing import status as status_of
    from loratools.storage.places import parse_place
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.output import Output

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    check_exports(table=table, force=force)
    report = status_of(parse_place(place))
    write_exports(report, table=table, force=force)
    shown.show(report)


@hub.command()
def catalog(
    path: Annotated[Path, Argument(metavar="OUT", help="What hub run writes to, or any folder of adapters.")],
    output: Annotated[Path, Option("--output", "-o", metavar="FILE.parquet", help="Where to write.")],
    html: Annotated[Path | None, Option(metavar="FILE.html", help="Write a page to search, too.")] = None,
    workers: Annotated[int, Option(metavar="N", help="Processes, which share the cores.")] = 1,
    resume: Annotated[bool, Option("--resume", help="Take over the rows of adapters that have not changed.")] = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Gather receipts and spectra of a whole hub in one Parquet file.

    A row for each adapter, which DuckDB, pandas and others read (needs loratools[hub]). What fails is a row with its
    reason, and exit code 3.

    Example: loratools hub catalog small/ -o catalog.parquet --html catalog.html
    """
    from loratools.hub.cataloguing import Catalog
    from loratools.hub.cataloguing import catalog as write
    from loratools.hub.page import write_page
    from loratools.reports.pages import check_place
    from loratools_cli.exit_codes import ExitCode
    from loratools_cli.output import Output, say
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    if html is not None:
        check_place(html, force=force or resume)
    with Progress() as progress:
        report = write(path, output, Catalog(workers, resume, force), steps=progress.steps)
    if html is not None:
        write_page(output, html, force=force or resume)
        say(f"wrote {html}")
    shown.show(report)
    if report.counts.get("failed"):
        raise typer.Exit(ExitCode.INPUT)


hub.command()(similar)
hub.command()(pack)
hub.command()(unpack)
hub.command("pack-add")(pack_add)
hub.command()(plan)
hub.command()(mixture)
hub.command()(route)
hub.command("route-fit")(route_fit)


def _recipe_and_places(places: list[str], steps: list[str]) -> tuple[Recipe, Place, Place]:
    from loratools.errors import UsageError
    from loratools.hub.recipe import parse_steps, read_recipe
    from loratools.storage.places import parse_place

    if len(places) == 3 and not steps:
        return read_recipe(Path(places[0])), parse_place(places[1]), parse_place(places[2])
    if len(places) == 2 and steps:
        return parse_steps(steps), parse_place(places[0]), parse_place(places[1])
    raise UsageError("name a recipe, a hub and an output; or give --step, and name a hub and an output")


def _shard(text: str) -> tuple[int, int]:
    from loratools.errors import UsageError

    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal():
        raise UsageError(f"--shard {text}: write I/N, such as 3/16")
    return int(index), int(count)
