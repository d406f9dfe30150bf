"""`loratools quantize` and `loratools dequantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from loratools_cli import options

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.ops.quantize import Quantize
    from loratools_cli.output import Output


def quantize(
    path: options.AdapterPath,
    bits: Annotated[
        float | None, Option(metavar="B", help="Bits to a number: for grid any, such as 1.5; else 1, 2, 3, 4 or 8.")
    ] = None,
    budget: options.Budget = None,
    ratio: options.Ratio = None,
    method: Annotated[
        Literal["grid", "exact", "balanced", "rtn", "sign", "lloyd", "nf", "petl", "loraquant", "delta-come"],
        Option(help="How; grid has the least error for its bytes."),
    ] = "grid",
    group: Annotated[int, Option(metavar="N", help="Numbers that share a scale.")] = 64,
    scales: Annotated[
        Literal["tensor", "component", "channel", "group"], Option(help="What shares a scale: rtn, sign, lloyd, nf.")
    ] = "group",
    rounds: Annotated[int, Option(metavar="N", help="Code what is left over N - 1 times more.")] = 1,
    gauge: Annotated[
        Literal["svd", "hadamard", "random", "learned"], Option(help="For balanced: how the rank space is turned.")
    ] = "learned",
    sweeps: Annotated[
        int, Option(metavar="N", help="For balanced: least-squares turns of one factor for the other.")
    ] = 2,
    energy: Annotated[float, Option(metavar="SHARE", help="For loraquant: share of the squared spectrum.")] = 0.8,
    seed: Annotated[int, Option(metavar="N", help="For random rotations.")] = 0,
    weights: options.Weights = None,
    alpha: options.Alpha = None,
    enable_lora: options.EnableLora = None,
    scaling: options.Scaling = None,
    allow_nonfinite: options.AllowNonfinite = False,
    output: options.OutputPath = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write an adapter in few bits, as one small file.

    Every command reads it. Give --bits, or with the default method a --budget or --ratio. It chooses ranks and bits
    target by target, for the least error of the whole delta; exact packs what was trained on a grid without loss; the
    other methods are published ones, and plain rounding.

    \b
    Examples:
      loratools quantize my_lora.safetensors --bits 2
      loratools quantize my_peft_folder --budget 500kB -o small
      loratools quantize my_lora.safetensors --bits 4 --method rtn
    """
    from loratools.errors import UsageError
    from loratools.ops.quantize import Quantize
    from loratools.ops.statistics import load_statistics
    from loratools.rank_choice import RankChoice
    from loratools_cli.opening import open_adapter
    from loratools_cli.output import Output

    given = [name for name, value in (("--bits", bits), ("--budget", budget), ("--ratio", ratio)) if value is not None]
    if method == "exact" and given:
        raise UsageError(f"--method exact keeps the numbers as they are; it takes no {given[0]}")
    if len(given) != 1 and method != "exact":
        wrong = (
            f"{' and '.join(given)} exclude each other; give one of them"
            if given
            else "give --bits, --budget or --ratio"
        )
        raise UsageError(f"how small is not clear: {wrong}")
    choice = RankChoice(budget=budget, ratio=ratio)
    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    adapter = open_adapter(path, alpha=alpha, enable_lora=enable_lora, scaling=scaling)
    how = Quantize(
        method,
        4 if bits is None else bits,
        None if bits is not None or method == "exact" else choice.bytes(adapter.file_nbytes),
        group,
        scales,
        rounds,
        gauge,
        sweeps,
        energy,
        seed,
        allow_nonfinite,
        None if weights is None else load_statistics(weights, adapter),
    )
    tag = method if method == "exact" else choice.tag if bits is None else f"{method}{bits:g}bit"
    write_quantized(adapter, how, output, tag, shown=shown, dry_run=dry_run, force=force)


def write_quantized(
    adapter: Adapter, how: Quantize, output: Path | None, tag: str, *, shown: Output, dry_run: bool, force: bool
) -> None:
    """Quantise to `output`, or to a file beside the input, with progress, and show what came of it."""
    from loratools.files import packed_place
    from loratools.ops.quantize import quantize as in_memory
    from loratools.ops.quantize import quantize_file
    from loratools_cli.destination import packed_destination
    from loratools_cli.progress import Progress

    place = packed_place(packed_destination(adapter, output, tag), force=force or dry_run)
    with Progress() as progress:
        watched = progress.watch(adapter)
        report = in_memory(watched, how)[1] if dry_run else quantize_file(watched, place, how, force=force)[1]
    shown.show(report, planned=place if dry_run else None)


def dequantize(
    path: options.AdapterPath,
    to: Annotated[
        str | None, Option("--to", metavar="DIALECT", help="peft, kohya, diffusers, comfy or mlx; its own by default.")
    ] = None,
    dtype: Annotated[
        Literal["f32", "f16", "bf16"] | None, Option(help="Of the factors; by default what they were before.")
    ] = None,
    output: options.OutputPath = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a quantised adapter as an ordinary one.

    In the dtype that its numbers had before, unless --dtype says otherwise.

    Example: loratools dequantize my_lora.grid2bit.safetensors --to peft -o my_lora_again
    """
    from loratools.errors import UsageError
    from loratools.ops.convert import Convert
    from loratools.ops.quantize import dtype_before
    from loratools_cli.convert import check_dialect, write_conversion
    from loratools_cli.opening import open_adapter
    from loratools_cli.output import Output

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    adapter = open_adapter(path)
    if adapter.origin is None or adapter.origin.container != "packed":
        raise UsageError(f"{path}: is an ordinary adapter already; loratools convert writes it in another dialect")
    dialect = to or adapter.format.name
    check_dialect(dialect)
    how = Convert(dtype=dtype or dtype_before(adapter))
    write_conversion(adapter, dialect, how, output, "dequantized", shown=shown, dry_run=dry_run, force=force)
