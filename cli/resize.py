"""`loratools expand` and `loratools restrict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from loratools_cli import options

if TYPE_CHECKING:
    from loratools.ops.resize import Verb

Plan = Annotated[
    Path,
    Option(
        metavar="JSON_OR_DIR", help="What was pruned: a plan (see the guide), or a folder of LoRAM's pruned_idx files."
    ),
]
Base = Annotated[
    Path | None,
    Option(metavar="DIR_OR_FILE", help="The model it is to fit, or its config.json: checks shapes, states heads."),
]


def expand(
    path: options.AdapterPath,
    plan: Plan,
    base: Base = None,
    alpha: options.Alpha = None,
    output: options.OutputPath = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Move an adapter of a pruned model to the full one.

    Zeros go where outputs and inputs were pruned away, as LoRAM does; every other number stays as it is.

    \b
    Examples:
      loratools expand pruned_lora --plan plan.json -o full_lora
      loratools expand pruned_lora --plan pruned_idx/ --base llama/config.json
    """
    _resize("expand", path, plan, base, alpha, output, dry_run, force, everything, as_json, quiet)


def restrict(
    path: options.AdapterPath,
    plan: Plan,
    base: Base = None,
    alpha: options.Alpha = None,
    output: options.OutputPath = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Move an adapter of a full model to the pruned one.

    The inverse of expand: factors are sliced, and what the pruned model has no place for is counted and dropped. Heads
    in a folder of pruned_idx files are those of the full model: state them with its config as --base.

    Example: loratools restrict full_lora --plan plan.json -o pruned_lora
    """
    _resize("restrict", path, plan, base, alpha, output, dry_run, force, everything, as_json, quiet)


def _resize(
    verb: Verb,
    path: Path,
    plan: Path,
    base: Path | None,
    alpha: float | None,
    output: Path | None,
    dry_run: bool,
    force: bool,
    everything: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from loratools.ops import resize
    from loratools.ops.prune_plan import Heads, read_plan
    from loratools_cli.destination import destination
    from loratools_cli.opening import open_adapter, open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    held = open_base(base)
    cuts = read_plan(plan, None if held is None else Heads.from_config(held.config))
    adapter = open_adapter(path, alpha=alpha)
    tag = {"expand": "full", "restrict": "pruned"}[verb]
    place = destination(adapter, output, tag, force=force or dry_run)
    with Progress() as progress:
        made, report = getattr(resize, verb)(progress.watch(adapter), cuts, base=held)
        if not dry_run:
            report = resize.resize_file(made, report, place, force=force)[1]
    shown.show(report, planned=place if dry_run else None)
