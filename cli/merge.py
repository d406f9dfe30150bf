"""`loratools merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from loratools_cli import options


def merge(
    adapters: Annotated[
        list[str], Argument(metavar="PATH[:WEIGHT]...", help="Adapters, each with a weight; 1 where none is given.")
    ],
    output: Annotated[
        Path, Option("--output", "-o", metavar="PATH", help="Where to write, in the dialect of the first adapter.")
    ],
    method: Annotated[
        Literal["sum", "ties", "dare", "knots", "tsv"], Option(help="How deltas of the same module become one.")
    ] = "sum",
    density: Annotated[
        float | None, Option(metavar="D", help="Share that ties, dare, knots or tsv keeps of each delta.")
    ] = None,
    rank: options.Rank = None,
    energy: options.Energy = None,
    budget: options.Budget = None,
    ratio: Annotated[
        float | None, Option(metavar="X", help="Size of the output: that of all inputs, divided by X.")
    ] = None,
    threshold: options.Threshold = None,
    elbow: options.Elbow = False,
    sv_ratio: options.SvRatio = None,
    sv_fro: options.SvFro = None,
    sv_cumulative: options.SvCumulative = None,
    adaptertune: options.AdapterTune = None,
    max_rank: options.MaxRank = None,
    min_rank: options.MinRank = 1,
    multiple_of: options.MultipleOf = 1,
    uniform: options.Uniform = False,
    relative_to: options.RelativeTo = None,
    seed: Annotated[int, Option(metavar="N", help="For dare, and for the SVD of large dense merges.")] = 0,
    base: options.Base = None,
    drop_extras: Annotated[bool, Option("--drop-extras", help="Leave out tensors that are no update.")] = False,
    first_extras: Annotated[bool, Option("--first-extras", help="Take such tensors from the first adapter.")] = False,
    alpha: options.Alpha = None,
    scaling: options.Scaling = None,
    device: options.Device = "cpu",
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Merge adapters of any ranks and families.

    Merges what they do, never their factors. Without a rule for the ranks, a sum is exact; the rules are those of
    squeeze.

    \b
    Examples:
      loratools merge style:0.7 subject:0.3 -o both
      loratools merge a.safetensors b.safetensors --method ties --rank 16 -o ab
    """
    from dataclasses import replace

    import loratools
    from loratools.errors import UsageError
    from loratools.files import save
    from loratools.rank_choice import RankChoice
    from loratools.ranks import Limits
    from loratools_cli.destination import destination
    from loratools_cli.opening import open_adapter, open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress
    from loratools_cli.weighted import path_and_weight

    choice = RankChoice(rank, energy, budget, ratio, threshold, elbow, sv_ratio, sv_fro, sv_cumulative, adaptertune)
    if choice.is_given:
        _ = choice.given  # before anything is read: a wrong choice is known now
    if drop_extras and first_extras:
        raise UsageError("--drop-extras and --first-extras exclude each other; give one of them")
    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    options.check_device(device)
    pairs = [path_and_weight(text) for text in adapters]
    opened = [open_adapter(path, alpha=alpha, scaling=scaling) for path, _ in pairs]
    size = sum(adapter.file_nbytes for adapter in opened)
    policy = choice.policy(size, relative_to) if choice.is_given else None
    if policy is None and relative_to:
        raise UsageError("--relative-to weighs the errors of a budget; give --budget or --ratio with it")
    limits = Limits(min_rank, max_rank, multiple_of, uniform)
    kept: Literal["equal", "first", "drop"] = "drop" if drop_extras else "first" if first_extras else "equal"
    how = loratools.Merge(method, density, seed, open_base(base), device, kept)
    place = destination(opened[0], output, "merged", force=force or dry_run)
    with Progress() as progress:
        weighted = [(progress.watch(a), weight) for a, (_, weight) in zip(opened, pairs, strict=True)]
        merged, report = loratools.merge(weighted, policy, limits=limits, options=how)
        if not dry_run:
            report = replace(report, output=str(save(merged, place, force=force).path))
    shown.show(report, planned=place if dry_run else None)
