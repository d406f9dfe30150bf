"""`loratools convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from loratools_cli import options

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.ops.convert import Convert
    from loratools_cli.output import Output


def convert(
    path: options.AdapterPath,
    to: Annotated[str, Option("--to", metavar="DIALECT", help="peft, kohya, diffusers, comfy, gguf or mlx.")],
    exact: Annotated[
        bool, Option("--exact", help="Write families that the dialect lacks as the LoRA that they are exactly.")
    ] = False,
    rank: Annotated[
        int | None, Option(metavar="N", help="Approximate families that the dialect lacks at rank N; error printed.")
    ] = None,
    energy: Annotated[
        float | None, Option(metavar="SHARE", help="As --rank, keeping this share of the squared spectrum.")
    ] = None,
    portable: Annotated[
        bool, Option("--portable", help="One rank by zero padding, scale 1, no patterns: what servers want.")
    ] = False,
    fold_alpha: Annotated[
        bool, Option("--fold-alpha", help="Multiply every scale into the factors, for readers that ignore alpha.")
    ] = False,
    no_metadata: Annotated[
        bool, Option("--no-metadata", help="Write tensors alone; the way back may then lose names and config.")
    ] = False,
    dtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None, Option(help="Of the factors; their own by default. q8_0: GGUF.")
    ] = None,
    drop: Annotated[
        list[str] | None,
        Option(metavar="KIND", help="Leave out what has no place: bias, extras, unsupported or unmapped."),
    ] = None,
    model: Annotated[
        Literal["sd", "sdxl", "flux", "sd3", "wan", "qwen"] | None,
        Option(help="The base model's kind, where names do not tell."),
    ] = None,
    component: Annotated[
        str | None, Option(metavar="NAME", help="Only this part of a pipeline: unet, transformer, text_encoder, ...")
    ] = None,
    base: options.Base = None,
    initial_adapter: options.InitialAdapter = None,
    initial_from_base: options.InitialFromBase = False,
    residual_base: options.ResidualBase = None,
    alpha: options.Alpha = None,
    snell_threshold: options.SnellThreshold = None,
    enable_lora: options.EnableLora = None,
    petl: options.Petl = None,
    seed: Annotated[int, Option(metavar="N", help="For approximations by randomised SVD.")] = 0,
    output: options.OutputPath = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Rewrite an adapter in another dialect.

    Names are mapped through the model's modules; alpha, config and metadata come back on the way back. What the dialect
    has no place for is refused by name.

    \b
    Examples:
      loratools convert my_lora.safetensors --to diffusers
      loratools convert my_peft_folder --to peft --portable -o portable
      loratools convert my_loha.safetensors --to peft --rank 32
      loratools convert my_peft_folder --to gguf --base llama/config.json
      loratools convert my_peft_folder --to mlx
      loratools convert my_pissa --to peft --base llama --initial-from-base
      loratools convert cifar-bit1-dim32.bin --petl cifar.yaml --to peft
    """
    from loratools.errors import UsageError
    from loratools.ops.convert import DROPPABLE, Convert
    from loratools.ops.lowering import Lowering
    from loratools_cli.opening import open_adapter, open_base, relative_to_base
    from loratools_cli.output import Output

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    check_dialect(to)
    if unknown := [kind for kind in drop or [] if kind not in DROPPABLE]:
        raise UsageError(f"--drop {unknown[0]}: what can be dropped is {', '.join(DROPPABLE)}")
    if rank is not None and energy is not None:
        raise UsageError("--rank and --energy exclude each other; give one of them")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank} is below 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy {energy} is not a share between 0 and 1")
    weights = open_base(base)
    how = Convert(
        lowering=Lowering(exact, rank, energy, seed),
        portable=portable,
        fold_alpha=fold_alpha,
        metadata=not no_metadata,
        drop=frozenset(drop or ()),
        model=model,
        component=component,
        base=weights,
        dtype=dtype,
    )
    adapter = open_adapter(
        path,
        alpha=alpha,
        enable_lora=enable_lora,
        initial=initial_adapter,
        base=weights,
        petl=petl,
        thresholds=snell_threshold,
    )
    if initial_from_base or residual_base is not None:
        if initial_adapter is not None or (initial_from_base and residual_base is not None):
            raise UsageError("--initial-adapter, --initial-from-base and --residual-base exclude each other")
        adapter = relative_to_base(adapter, weights, open_base(residual_base))
    write_conversion(adapter, to, how, output, to, shown=shown, dry_run=dry_run, force=force)


def check_dialect(to: str) -> None:
    """UsageError for a dialect that cannot be written."""
    from loratools.errors import UsageError
    from loratools.formats import writable_formats

    if to not in writable_formats():
        raise UsageError(f"--to {to}: the dialects that can be written are {', '.join(writable_formats())}")


def write_conversion(
    adapter: Adapter,
    to: str,
    how: Convert,
    output: Path | None,
    tag: str,
    *,
    shown: Output,
    dry_run: bool,
    force: bool,
) -> None:
    """Convert to `output`, or to a place beside the input, with progress, and show what came of it."""
    from loratools.ops.convert import convert as planned_conversion
    from loratools.ops.convert import write_converted
    from loratools_cli.destination import destination
    from loratools_cli.progress import Progress

    with Progress() as progress:
        result, report = planned_conversion(progress.watch(adapter), to, how)
        place = destination(result, output, tag, force=force or dry_run)
        if not dry_run:
            report = write_converted(result, report, place, force=force)[1]
    shown.show(report, planned=place if dry_run else None)
