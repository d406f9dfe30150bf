"""`loratools reparameterize`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from loratools_cli import options

if TYPE_CHECKING:
    from collections.abc import Mapping


def reparameterize(
    path: options.AdapterPath,
    to: Annotated[str, Option("--to", metavar="FAMILY", help="The family, by its name in loratools families.")],
    settings: Annotated[
        list[str] | None, Option("--set", metavar="NAME=VALUE", help="An option of the family; may be repeated.")
    ] = None,
    rank: Annotated[int | None, Option(metavar="N", help="Short for --set rank=N.")] = None,
    budget: Annotated[
        str | None, Option(metavar="SIZE", help="Bytes of all stored numbers: 4MB, 500kB; options follow from it.")
    ] = None,
    base: options.Base = None,
    weights: options.Weights = None,
    dtype: Annotated[
        Literal["f32", "f16", "bf16"] | None, Option(help="Of stored numbers; by default what most of the input has.")
    ] = None,
    accept_loss: Annotated[
        bool, Option("--accept-loss", help="Write it even if more than half of the delta's norm is lost.")
    ] = False,
    seed: Annotated[int, Option(metavar="N", help="For random bases and restarts.")] = 0,
    alpha: options.Alpha = None,
    snell_threshold: options.SnellThreshold = None,
    enable_lora: options.EnableLora = None,
    output: options.OutputPath = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the same deltas in another family.

    Sparse, wavelet, shared or random bases, and many more: see loratools families. What is lost is measured as stored.
    The file is in loratools' own dialect, which every command reads; --to lora writes the adapter's former dialect.

    \b
    Examples:
      loratools reparameterize my_lora.safetensors --to ldu
      loratools reparameterize my_lora --to shira --rank 8 --accept-loss
      loratools reparameterize my_lora.ldu.safetensors --to lora -o my_lora_again
    """
    from loratools.ops.reparameterize import Reparameterize, formerly, reparameterize_file
    from loratools.ops.reparameterize import reparameterize as in_memory
    from loratools.ops.statistics import load_statistics
    from loratools.rank_choice import RankChoice
    from loratools_cli.destination import destination
    from loratools_cli.opening import open_adapter, open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    held = open_base(base)
    adapter = open_adapter(path, alpha=alpha, enable_lora=enable_lora, base=held, thresholds=snell_threshold)
    how = Reparameterize(
        _pairs(settings or [], rank),
        None if budget is None else RankChoice(budget=budget).bytes(adapter.file_nbytes),
        held,
        dtype,
        seed,
        accept_loss,
        None if weights is None else load_statistics(weights, adapter),
    )
    with Progress() as progress:
        made, report = in_memory(progress.watch(adapter), to, how)
        made = formerly(made) if to == "lora" else made
        place = destination(made, output, to, force=force or dry_run)
        if not dry_run:
            report = reparameterize_file(made, report, place, force=force)[1]
    shown.show(report, planned=place if dry_run else None)


def _pairs(settings: list[str], rank: int | None) -> Mapping[str, str]:
    """The options by name; UsageError for what is no NAME=VALUE, or is given twice."""
    from loratools.errors import UsageError

    found: dict[str, str] = {} if rank is None else {"rank": str(rank)}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set {setting}: write NAME=VALUE, such as rank=8")
        if name.strip() in found:
            raise UsageError(f"--set {setting}: {name.strip()} is given twice")
        found[name.strip()] = value.strip()
    return found
