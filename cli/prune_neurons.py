"""`loratools prune-neurons`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from loratools_cli import options


def prune_neurons(
    path: options.AdapterPath,
    width: Annotated[int | None, Option(metavar="N", help="Keep N hidden units of each bottleneck.")] = None,
    ratio: Annotated[float | None, Option(metavar="X", help="Keep 1/X of the hidden units.")] = None,
    exact: Annotated[bool, Option("--exact", help="Remove only units that change nothing.")] = False,
    stats: options.ActivationsPath = None,
    ridge: Annotated[float, Option(metavar="L", help="Ridge of the fit, relative to a unit's mean square.")] = 1e-6,
    held_out: Annotated[float, Option(metavar="SHARE", help="Share of the tokens that the fit does not see.")] = 0.2,
    activation: options.Activation = None,
    experts: options.MosaExperts = None,
    petl: options.Petl = None,
    allow_unchanged: options.AllowUnchanged = False,
    output: options.OutputPath = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Remove hidden units of nonlinear bottlenecks.

    First go units that change nothing: zero columns of up, constant units (into the bias), and
    duplicates. With --width or --ratio, and the activations that enter each bottleneck, those that
    vary most in what is added stay, and up is fitted again by ridge least squares; errors are told
    on the tokens fitted and on those held out. --stats is a safetensors file of one tensor
    (tokens, d) for each bottleneck, by the names that loratools neurons lists.

    \b
    Examples:
      loratools prune-neurons my_pfeiffer --exact
      loratools prune-neurons best.pt --width 8 --stats activations.safetensors
    """
    import loratools
    from loratools.errors import UsageError
    from loratools_cli.destination import destination
    from loratools_cli.opening import open_adapter
    from loratools_cli.output import Output

    if [width is not None, ratio is not None, exact].count(True) != 1:
        raise UsageError("give --width, --ratio or --exact, one of the three")
    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    how = loratools.PruneNeurons(width, ratio, ridge, held_out, activation, experts)
    adapter = open_adapter(path, petl=petl, weights=False)
    tag = "exact" if exact else f"w{width}" if width is not None else f"x{ratio:g}"
    place = destination(adapter, output, tag, force=force or dry_run)
    found = None if stats is None else loratools.load_activations(stats)
    if dry_run:
        report = loratools.prune_neurons(adapter, how, activations=found, allow_unchanged=allow_unchanged)[1]
    else:
        report = loratools.prune_neurons_file(
            adapter, place, how, activations=found, allow_unchanged=allow_unchanged, force=force
        )[1]
    shown.show(report, planned=place if dry_run else None)
