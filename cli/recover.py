"""`loratools recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from loratools_cli import options


def recover(
    path: options.AdapterPath,
    base: Annotated[Path, Option(metavar="MODEL", help="Base model: a Hugging Face folder, a .gguf file.")],
    data: Annotated[Path, Option(metavar="FILE", help="Rows of JSON: prompt and answer, or text.")],
    output: Annotated[Path, Option("--output", "-o", metavar="PATH", help="Folder, or file where it is in codes.")],
    steps: Annotated[int, Option(metavar="N", help="Steps of training.")] = 50,
    learning_rate: Annotated[
        float | None,
        Option("--learning-rate", "--lr", metavar="R", help="Of AdamW: 5e-4 by default, or 0.02 units on a grid."),
    ] = None,
    batch: Annotated[int, Option(metavar="N", help="Rows to a step.")] = 8,
    max_rows: Annotated[int | None, Option(metavar="N", help="Use the first N rows.")] = None,
    held_out: Annotated[
        float, Option(metavar="SHARE", help="Rows, 64 at most, by which the best state is chosen.")
    ] = 0.1,
    chat: Annotated[bool, Option("--chat", help="Put prompts into the tokenizer's chat template.")] = False,
    seed: Annotated[int, Option(metavar="N", help="Of the order of the rows.")] = 0,
    device: options.Device = "cpu",
    allow_download: Annotated[bool, Option("--allow-download", help="Names of models may be fetched.")] = False,
    resume: Annotated[bool, Option("--resume", help="Go on where an earlier run ended.")] = False,
    force: Annotated[bool, Option("--force", help="Replace an existing output.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a squeezed or quantised adapter a little.

    What `quantize` wrote by its default method, or by rtn, sign, lloyd, nf or petl, is trained in its codes and stays
    in them. Needs loratools[models].

    \b
    Examples:
      loratools squeeze my_lora --rank 4 -o small
      loratools recover small --base model/ --data task.jsonl --steps 50 -o better
    """
    from loratools.training.models import load_model, working_dtype
    from loratools.training.recover import Recover, cost, output_of, read_train_rows
    from loratools.training.recover import recover as recovered
    from loratools_cli.interrupts import resumable
    from loratools_cli.opening import open_adapter
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet)
    options.check_device(device)
    how = Recover(steps, learning_rate, batch, held_out, chat, device, seed)
    adapter = open_adapter(path)
    output_of(adapter, output, resume=resume, force=force)
    rows = read_train_rows(data, max_rows)
    shown.announce(lambda: cost(base, rows, how))
    model, tokenizer = load_model(base, device, allow_download=allow_download, dtype=working_dtype(device))
    with resumable(), Progress() as progress:
        step = progress.meter(steps, "steps")
        _, report = recovered(model, tokenizer, adapter, rows, output, how, resume=resume, force=force, step=step)
    shown.show(report)
