"""`loratools hub mixture`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from loratools_cli import options

if TYPE_CHECKING:
    from collections.abc import Mapping


def mixture(
    adapters: Annotated[list[Path], Argument(metavar="PATH...", help="The experts: adapters of one base.")],
    router: Annotated[
        Path | None,
        Option(metavar="FILE", help="Routing weights, (samples x) layers x experts: .npy, .json, .csv, .safetensors."),
    ] = None,
    logits: Annotated[bool, Option("--logits", help="They are logits or biases, and go through a softmax.")] = False,
    top_k: Annotated[
        int | None, Option("--top-k", metavar="K", help="Keep the K experts of most mass in each layer.")
    ] = None,
    one_set: Annotated[bool, Option("--one-set", help="Keep the same experts in all layers.")] = False,
    weighting: Annotated[
        Literal["mean", "sum"], Option(help="What each kept expert counts: 1/k, or 1 as if all were active.")
    ] = "mean",
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="PATH", help="Write the kept experts as one adapter.")
    ] = None,
    prototypes: Annotated[
        Path | None,
        Option(metavar="FILE.safetensors", help="Write Arrow's routing prototypes: experts x inputs for each target."),
    ] = None,
    rank: options.Rank = None,
    energy: options.Energy = None,
    weights: Annotated[
        Path | None, Option(metavar="FILE", help="Count changes by the inputs that calibrate measured for the first.")
    ] = None,
    base: options.Base = None,
    drop_extras: Annotated[bool, Option("--drop-extras", help="Leave out tensors that are no update.")] = False,
    table: options.TablePath = None,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare adapters as experts, and merge a set of them.

    The merge weighs the experts equally and is exact, unless a rank is given.

    \b
    Examples:
      loratools hub mixture a b c --router weights.npy --top-k 2
      loratools hub mixture a b c --router weights.npy --top-k 2 -o merged
    """
    from dataclasses import replace

    from loratools.errors import UsageError
    from loratools.files import save
    from loratools.ops.merge import Merge
    from loratools.ops.mixture import Mixture, merge_route_set
    from loratools.ops.mixture import mixture as mixture_of
    from loratools.ops.routing import load_routing
    from loratools.ops.statistics import load_statistics
    from loratools.rank_choice import RankChoice
    from loratools.reports.output import checked
    from loratools_cli.destination import destination
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.opening import open_adapter, open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    choice = RankChoice(rank=rank, energy=energy)
    policy = choice.policy(0, None) if choice.is_given else None
    if policy is not None and output is None:
        raise UsageError("a rank is for the merge; say where to write it, with -o")
    if weights is not None and router is None:
        raise UsageError("--weights counts what equal weights change, so it needs --router")
    if (logits or one_set) and router is None:
        raise UsageError("--logits and --one-set are about the weights of a router; give --router too")
    check_exports(table=table, force=force)
    if prototypes is not None:
        checked(prototypes, (".safetensors",), "a file of prototypes", force=force)
    opened = [open_adapter(path) for path in adapters]
    routed = None if router is None else load_routing(router, len(opened), logits=logits)
    statistics = None if weights is None else load_statistics(weights, opened[0])
    merging = Merge(base=open_base(base), extras="drop" if drop_extras else "equal")
    place = None if output is None else destination(opened[0], output, "mixture", force=force)
    with Progress() as progress:
        watched = [progress.watch(adapter) for adapter in opened]
        how = Mixture(top_k, one_set, weighting, statistics, merging)
        report, chosen = mixture_of(watched, routed, how=how)
        if place is not None:
            merged, summary = merge_route_set(opened, _simplest(chosen), weighting, policy, options=merging)
            written = str(save(merged, place, force=force).path)
            report = replace(report, output=written, merged_error=float(summary.total["relative_error"]))
    if prototypes is not None:
        from loratools.ops.mixture import write_prototypes

        write_prototypes(opened, prototypes)
    write_exports(report, table=table, force=force)
    shown.show(report)


def _simplest(chosen: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
    """One set where it is the same for all targets, so that only its experts are read."""
    sets = set(chosen.values())
    return next(iter(sets)) if len(sets) == 1 else chosen
