"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import typer

AdapterPath = Annotated[Path, typer.Argument(metavar="PATH", help="Adapter: a weights file, or a folder with one.")]
Alpha = Annotated[float | None, typer.Option(metavar="A", help="Alpha, where the file does not state it.")]
Scaling = Annotated[
    Literal["none", "rank", "sqrt"] | None,
    typer.Option(help="How MatryoshkaLoRA scaled each rank: not at all, by 1/rank or by 1/sqrt(rank)."),
]
EnableLora = Annotated[
    str | None,
    typer.Option(
        "--enable-lora",
        metavar="FLAGS",
        help="Which of the projections that a loralib or LitGPT parameter fuses are updated, such as 1,0,1.",
    ),
]
SnellThreshold = Annotated[
    str | None,
    typer.Option(
        "--snell-threshold",
        metavar="SHARE_OR_JSON",
        help="The share of entries that SNELL drops: one for all, or a JSON file of target: share.",
    ),
]
Petl = Annotated[
    Path | None,
    typer.Option(
        "--petl", metavar="YAML", help="What a file of PETL-ViT holds, where its YAML does not lie beside it."
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(metavar="DIR_OR_FILE", help="Base model: its weights file or folder. DoRA needs it."),
]
Weights = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Count errors by the inputs that calibrate measured.")
]
ActivationsPath = Annotated[
    Path | None, typer.Option("--stats", metavar="FILE", help="Activations: what enters each bottleneck, by its name.")
]
Activation = Annotated[
    str | None, typer.Option(metavar="NAME", help="The activation, where the file does not state it: relu, gelu, silu.")
]
MosaExperts = Annotated[
    Literal["stored", "assembled", "mean"] | None,
    typer.Option(help="MoSA's experts: as merged in the file, their changes added up, or their mean."),
]
InitialAdapter = Annotated[
    Path | None,
    typer.Option(
        "--initial-adapter", metavar="PATH", help="For PiSSA and its kin: the adapter as saved before training."
    ),
]
InitialFromBase = Annotated[
    bool,
    typer.Option("--initial-from-base", help="For PiSSA by full SVD: take the initial factors out of --base again."),
]
ResidualBase = Annotated[
    Path | None,
    typer.Option(
        "--residual-base", metavar="DIR_OR_FILE", help="For PiSSA and its kin: the changed base it was trained on."
    ),
]
Target = Annotated[str | None, typer.Option(metavar="GLOB", help="Only the targets that match, such as 'q_proj'.")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to compute.")]
VerdictMethod = Annotated[
    Literal["auto", "dense", "certified"],
    typer.Option(
        "--method", help="Decompose each base weight whole, or decide by bounds; auto: by bounds where that is faster."
    ),
]
Cached = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep singular vectors of the base; see loratools cache.")
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Carry targets with NaN or infinity over as they are.")
]
AllowUnchanged = Annotated[
    bool, typer.Option("--allow-unchanged", help="Write the output even if nothing in it changes.")
]
OutputPath = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="PATH", help="Where to write, instead of beside the input."),
]
ReportPath = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="Write an interactive page (needs loratools[report])."),
]
FigurePath = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw a figure, as .png or .svg (needs loratools[plot]).")
]
TablePath = Annotated[
    Path | None,
    typer.Option(
        "--table", metavar="FILE", help="Write all numbers, as .csv, or as .parquet (needs loratools[report])."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would come out, write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output, the input itself included.")]
Everything = Annotated[bool, typer.Option("--all", help="Show every target, not a summary.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the path that was written.")]

# The rules for ranks, of every command that chooses them.
Rank = Annotated[int | None, typer.Option(metavar="N", help="The same rank everywhere.")]
Energy = Annotated[float | None, typer.Option(metavar="SHARE", help="Share of the squared spectrum to keep.")]
Budget = Annotated[str | None, typer.Option(metavar="SIZE", help="Size of the output: 4MB, 500kB, 1.5MiB.")]
Ratio = Annotated[float | None, typer.Option(metavar="X", help="Size of the output: the input's, divided by X.")]
Threshold = Annotated[float | None, typer.Option(metavar="T", help="Drop singular values up to T times the largest.")]
Elbow = Annotated[bool, typer.Option("--elbow", help="Cut each spectrum where it bends.")]
SvRatio = Annotated[float | None, typer.Option(metavar="R", help="As in sd-scripts: sv_ratio.")]
SvFro = Annotated[float | None, typer.Option(metavar="F", help="As in sd-scripts: sv_fro.")]
SvCumulative = Annotated[float | None, typer.Option(metavar="C", help="As in sd-scripts: sv_cumulative.")]
AdapterTune = Annotated[
    str | None, typer.Option(metavar="NOISE:SAMPLES", help="AdapterTune's elbow, such as 1e-4:5000.")
]
MaxRank = Annotated[int | None, typer.Option(metavar="N", help="No rank above N.")]
MinRank = Annotated[int, typer.Option(metavar="N", help="No rank below N.")]
MultipleOf = Annotated[int, typer.Option(metavar="N", help="Ranks rounded up to multiples of N.")]
Uniform = Annotated[bool, typer.Option("--uniform", help="One rank for all targets.")]
RelativeTo = Annotated[
    Literal["base", "self"] | None, typer.Option(help="For a budget: errors relative to what; absolute by default.")
]


def check_device(device: str) -> None:
    """UsageError for an accelerator that this machine or this torch does not have."""
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        from loratools.errors import UsageError

        raise UsageError(f"--device {device}: torch {torch.__version__} finds no CUDA device here; use --device cpu")


def refuse_unused(context: typer.Context, form: str, used: Collection[str]) -> None:
    """UsageError for options on the command line that this form of the command, having read them, would pass over.

    `used` are the names of its parameters; where to compute, what to replace and how to answer are of every form.
    """
    every = {*used, "device", "allow_download", "force", "as_json", "quiet"}
    stated = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in every
        and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    ]
    if stated:
        from loratools.errors import UsageError

        raise UsageError(
            f"{form} makes no use of {', '.join(stated)}; leave {'that' if len(stated) == 1 else 'those'} out"
        )


def thresholds(text: str | None) -> float | dict[str, float] | None:
    """A share, or a JSON file with one for each target; UsageError or InputError for anything else."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    from loratools.configs import read_config
    from loratools.formats.snell import shares

    return shares(read_config(Path(text)), text)


def flags(text: str | None) -> tuple[bool, ...] | None:
    """`1,0,1` as booleans; UsageError for anything else."""
    if text is None:
        return None
    words = [word.strip().lower() for word in text.split(",")]
    known = {"1": True, "true": True, "0": False, "false": False}
    if not any(known.get(word) for word in words) or not all(word in known for word in words):
        from loratools.errors import UsageError

        raise UsageError(f"--enable-lora {text}: give one flag for each projection, 1 or 0, such as 1,0,1")
    return tuple(known[word] for word in words)
