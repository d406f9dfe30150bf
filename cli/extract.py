"""`loratools extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from loratools_cli import options


def extract(
    base: Annotated[Path, Argument(metavar="BASE", help="Base model: its folder, index or weights file.")],
    tuned: Annotated[Path, Argument(metavar="TUNED", help="The model that was fine-tuned from it.")],
    output: Annotated[Path, Option("--output", "-o", metavar="PATH", help="The adapter to write.")],
    to: Annotated[
        Literal["peft", "bitdelta", "lycoris"],
        Option(help="A LoRA in a folder; or one file without ranks, of the sign of every change, or of all of it."),
    ] = "peft",
    rank: options.Rank = None,
    energy: options.Energy = None,
    budget: options.Budget = None,
    ratio: Annotated[
        float | None, Option(metavar="X", help="Size of the output: that of the changed matrices, divided by X.")
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
    seed: Annotated[int, Option(metavar="N", help="For the SVD of large matrices.")] = 0,
    device: options.Device = "cpu",
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a LoRA of what full fine-tuning changed.

    The best low-rank approximation of tuned - base for each matrix (PHLoRA). Changes that no LoRA holds, of norms,
    biases and embedding tables, are listed. Channels in another order (S2FT) are put back. With --to bitdelta, one bit
    for each number of a changed matrix instead; what else changed is kept whole. With --to lycoris, the changes of the
    matrices as they are, for loratools quantize.

    \b
    Examples:
      loratools extract llama llama-tuned --rank 16 -o tuned-r16
      loratools extract llama llama-tuned --energy 0.95 --max-rank 64 -o tuned
      loratools extract llama llama-tuned --to bitdelta -o tuned.bin
    """
    from dataclasses import replace

    import loratools
    from loratools.errors import UsageError
    from loratools.files import save
    from loratools.ops.bitdelta import extract_bitdelta
    from loratools.ops.whole import extract_whole
    from loratools.rank_choice import RankChoice
    from loratools.ranks import Limits
    from loratools.storage.atomic import refuse_existing
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    choice = RankChoice(rank, energy, budget, ratio, threshold, elbow, sv_ratio, sv_fro, sv_cumulative, adaptertune)
    if to == "peft":
        _ = choice.given  # before anything is read: a wrong choice is known now
    elif choice.is_given:
        raise UsageError(
            f"--to {to} has {'one bit to a number and ' if to == 'bitdelta' else ''}no ranks; "
            f"leave --{choice.given.replace('_', '-')} out"
        )
    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    options.check_device(device)
    refuse_existing(output, force=force or dry_run)
    limits = Limits(min_rank, max_rank, multiple_of, uniform)
    with Progress() as progress:
        before, after = loratools.load_base(base), loratools.load_base(tuned)
        step = progress.steps(len(after.source.specs), "parameters compared")
        found = loratools.differences(before, after, step=step)
        watched = replace(found, adapter=progress.watch(found.adapter))
        if to != "peft":
            place = None if dry_run else output
            if to == "bitdelta":
                report = extract_bitdelta(watched, after, place, force=force)
                report = report if dry_run else replace(report, output=str(output))
            else:
                report = extract_whole(watched, place, force=force)
            shown.show(report, planned=output if dry_run else None)
            return
        policy = choice.policy(found.adapter.nbytes)
        made, report = loratools.extract(watched, policy, limits=limits, seed=seed, device=device)
        if not dry_run:
            report = replace(report, output=str(save(made, output, force=force).path))
    shown.show(report, planned=output if dry_run else None)
