"""`loratools pareto`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from loratools_cli import options

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.ops.extract import Differences
    from loratools.reports.evaluate import Evaluation
    from loratools.training.evaluate import Evaluate
    from loratools_cli.progress import Progress


def pareto(
    path: Annotated[
        Path,
        Argument(metavar="PATH", help="Adapter; or, with --base, a model that was tuned whole.", show_default=False),
    ],
    methods: Annotated[
        str | None, Option(metavar="LIST", help="Only these, such as grid,svd,rtn; all of them by default.")
    ] = None,
    weights: options.Weights = None,
    base: Annotated[
        Path | None,
        Option(metavar="DIR_OR_FILE", help="Base model, of a model that was tuned whole, and for --eval: its folder."),
    ] = None,
    evaluate: Annotated[
        Path | None,
        Option(
            "--eval",
            metavar="FILE",
            help="Rows of prompt and answer: run the base with each of the best, which is slow.",
        ),
    ] = None,
    max_rows: Annotated[int | None, Option(metavar="N", help="For --eval: the first N rows.")] = None,
    chat: Annotated[bool, Option("--chat", help="For --eval: prompts in the tokenizer's chat template.")] = False,
    device: options.Device = "cpu",
    alpha: options.Alpha = None,
    enable_lora: options.EnableLora = None,
    scaling: options.Scaling = None,
    figure: options.FigurePath = None,
    table: options.TablePath = None,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show how small an adapter gets, and at what loss.

    Every method at every setting: the bytes of the file that it would write, the relative error of the whole delta, and
    the command that makes the file. Shown are the settings that no other beats; all with --all. With --weights, errors
    count by the inputs that calibrate measured. With --eval, how the best of them do a task (loratools[models]).

    \b
    Examples:
      loratools pareto my_lora.safetensors --plot curves.png
      loratools pareto my_peft_folder --methods grid,svd,rtn --table curves.csv
      loratools pareto llama-tuned --base llama
      loratools pareto my_lora --base llama --eval task.jsonl --max-rows 100
    """
    import loratools
    from loratools.adapter import Adapter
    from loratools.errors import UsageError
    from loratools.ops.pareto import METHODS
    from loratools.ops.statistics import load_statistics
    from loratools.training.evaluate import Evaluate
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.opening import open_adapter
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    if evaluate is not None and base is None:
        raise UsageError("--eval runs the base model; give its folder with --base")
    if evaluate is None and (chat or max_rows is not None):
        raise UsageError(f"{'--chat' if chat else '--max-rows'} is for --eval; give the rows to evaluate with it")
    how = Evaluate(max_rows, device=device, chat=chat)
    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    options.check_device(device)
    check_exports(figure=figure, table=table, force=force)
    chosen = METHODS if methods is None else tuple(m.strip() for m in methods.split(",") if m.strip())
    with Progress() as progress:
        opened: Adapter | Differences
        if base is None or enable_lora is not None or scaling is not None:
            opened = open_adapter(path, alpha=alpha, enable_lora=enable_lora, scaling=scaling)
        else:
            opened = _opened(path, base, alpha, progress)
        stats = None
        if weights is not None:
            if not isinstance(opened, Adapter):
                raise UsageError("statistics are of the factors of an adapter; a model that was tuned whole has none")
            stats = load_statistics(weights, opened)
        task = None if evaluate is None or base is None else _task(base, evaluate, how)
        report = loratools.pareto(opened, chosen, weights=stats, evaluate=task, steps=progress.steps)
    write_exports(report, figure=figure, table=table, force=force)
    shown.show(report)


def _opened(path: Path, base: Path, alpha: float | None, progress: Progress) -> Adapter | Differences:
    """An adapter, or what a whole model changed of the base."""
    import loratools
    from loratools.ops.fine_tunes import open_fine_tune

    found = open_fine_tune(path, loratools.load_base(base), alpha=alpha, steps=progress.steps)
    return found.differences or found.adapter


def _task(base: Path, data: Path, how: Evaluate) -> Callable[[Adapter | None], Evaluation]:
    """What runs the rows of a file through the base with an adapter."""
    from loratools.training.evaluate import evaluate, read_rows
    from loratools.training.models import load_model

    rows = read_rows(data, how.max_rows)
    model, tokenizer = load_model(base, how.device)

    def run(adapter: Adapter | None) -> Evaluation:
        return evaluate(model, tokenizer, rows, adapter, options=how)

    return run
