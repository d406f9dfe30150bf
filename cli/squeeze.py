"""`loratools squeeze`."""

from __future__ import annotations

from typing import Annotated, Literal

from typer import Option

from loratools_cli import options


def squeeze(
    path: options.AdapterPath,
    rank: options.Rank = None,
    energy: options.Energy = None,
    budget: options.Budget = None,
    ratio: options.Ratio = None,
    threshold: options.Threshold = None,
    elbow: options.Elbow = False,
    sv_ratio: options.SvRatio = None,
    sv_fro: options.SvFro = None,
    sv_cumulative: options.SvCumulative = None,
    adaptertune: options.AdapterTune = None,
    bits: Annotated[
        Literal["auto"] | None, Option(help="With --budget or --ratio: choose bits as well as ranks; see quantize.")
    ] = None,
    weights: options.Weights = None,
    max_rank: options.MaxRank = None,
    min_rank: options.MinRank = 1,
    multiple_of: options.MultipleOf = 1,
    uniform: options.Uniform = False,
    relative_to: options.RelativeTo = None,
    method: Annotated[Literal["auto", "exact", "rsvd"], Option(help="How to find the singular values.")] = "auto",
    seed: Annotated[int, Option(metavar="N", help="For rsvd, the randomised method.")] = 0,
    scale: Annotated[Literal["fold", "keep"], Option(help="Write the scale into the factors, or as it was.")] = "fold",
    base: options.Base = None,
    initial_adapter: options.InitialAdapter = None,
    alpha: options.Alpha = None,
    enable_lora: options.EnableLora = None,
    scaling: options.Scaling = None,
    device: options.Device = "cpu",
    allow_nonfinite: options.AllowNonfinite = False,
    allow_unchanged: options.AllowUnchanged = False,
    output: options.OutputPath = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Lower the ranks with the least possible error.

    Give one rule for the ranks: --rank, --energy, --budget, --ratio, --threshold, --elbow, --sv-ratio, --sv-fro,
    --sv-cumulative or --adaptertune.

    \b
    Examples:
      loratools squeeze my_lora.safetensors --rank 8
      loratools squeeze my_peft_folder --energy 0.95 -o smaller
      loratools squeeze my_lora.safetensors --budget 4MB --dry-run
      loratools squeeze my_lora.safetensors --budget 500kB --bits auto
      loratools squeeze my_lora.safetensors --rank 8 --weights stats.safetensors
    """
    import loratools
    from loratools.errors import UsageError
    from loratools.rank_choice import RankChoice
    from loratools.ranks import Limits
    from loratools_cli import quantize
    from loratools_cli.destination import destination
    from loratools_cli.opening import open_adapter, open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    choice = RankChoice(rank, energy, budget, ratio, threshold, elbow, sv_ratio, sv_fro, sv_cumulative, adaptertune)
    tag = choice.tag  # before anything is read: a wrong choice is known now
    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    options.check_device(device)
    adapter = open_adapter(path, alpha=alpha, enable_lora=enable_lora, scaling=scaling, initial=initial_adapter)
    if bits is not None:
        if budget is None and ratio is None:
            raise UsageError("--bits auto chooses bits and ranks for a size; give --budget or --ratio with it")
        met = None if weights is None else loratools.load_statistics(weights, adapter)
        how = loratools.Quantize(budget=choice.bytes(adapter.file_nbytes), allow_nonfinite=allow_nonfinite, weights=met)
        quantize.write_quantized(adapter, how, output, tag, shown=shown, dry_run=dry_run, force=force)
        return
    policy = choice.policy(adapter.file_nbytes, relative_to)
    limits = Limits(min_rank, max_rank, multiple_of, uniform)
    found = None if weights is None else loratools.load_statistics(weights, adapter)
    squeezing = loratools.Squeeze(method, scale, open_base(base), device, seed, allow_nonfinite, allow_unchanged, found)
    place = destination(adapter, output, tag, force=force or dry_run)
    with Progress() as progress:
        watched = progress.watch(adapter)
        if dry_run:
            report = loratools.squeeze(watched, policy, limits=limits, options=squeezing)[1]
        else:
            report = loratools.squeeze_file(watched, place, policy, limits=limits, options=squeezing, force=force)[1]
    shown.show(report, planned=place if dry_run else None)
