"""`loratools eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from loratools_cli import options

if TYPE_CHECKING:
    from loratools.base_weights import BaseWeights
    from loratools.formats import NestedScaling
    from loratools.training.task import Candidate

NONE = "none"  # names the base alone


def eval(  # noqa: A001 - the command's name
    adapters: Annotated[
        list[str],
        Argument(metavar="ADAPTER", help="Adapters, or none for the base alone; differences are to the first."),
    ],
    base: Annotated[str, Option(metavar="DIR", help="Base model: a Hugging Face folder.")],
    data: Annotated[Path, Option(metavar="FILE", help="Rows of JSON: prompt and answer, or prompt, choices, answer.")],
    metric: Annotated[
        Literal["exact", "nll", "choice"] | None,
        Option(help="Exact match and likelihood; likelihood alone; choices. By default what the rows are for."),
    ] = None,
    normalise: Annotated[
        Literal["none", "tokens", "bytes"], Option(help="Divide the log-likelihood of a choice by its length.")
    ] = "none",
    calibration: Annotated[
        bool, Option("--calibration", help="Calibration errors too: ECE, MCE, ACE, TACE, Brier, temperature.")
    ] = False,
    bins: Annotated[int, Option(metavar="N", help="Bins of the calibration errors.")] = 15,
    min_count: Annotated[int, Option("--min-count", metavar="N", help="MCE passes over smaller bins.")] = 1,
    threshold: Annotated[float, Option(metavar="P", help="TACE passes over smaller probabilities.")] = 0.01,
    temperature: Annotated[
        Literal["crossfit", "split", "none"],
        Option(help="Fit a temperature on four fifths of the rows for each fifth, or on a half for the other half."),
    ] = "crossfit",
    ranks: Annotated[
        str | None, Option(metavar="LIST", help="Cut the adapter to these ranks too, such as 1,2,4,8; with AURAC.")
    ] = None,
    slices: Annotated[
        Literal["keep", "dylora", "matryoshka"] | None,
        Option("--slice", help="Cut by keeping the first components, with this scale, and not by SVD."),
    ] = None,
    max_rows: Annotated[int | None, Option(metavar="N", help="The first N rows.")] = None,
    max_tokens: Annotated[int, Option(metavar="N", help="The longest answer of the model.")] = 64,
    batch: Annotated[int, Option(metavar="N", help="Rows at once.")] = 16,
    chat: Annotated[bool, Option("--chat", help="Prompts in the tokenizer's chat template.")] = False,
    resamples: Annotated[int, Option(metavar="N", help="Draws of the rows for the intervals.")] = 1000,
    seed: Annotated[int, Option(metavar="N", help="Of the draws and of the parts for the temperature.")] = 0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(help="Of the weights: float32, but bfloat16 on cuda, if not given."),
    ] = "auto",
    allow_download: Annotated[
        bool, Option("--allow-download", help="BASE may name a model on Hugging Face's hub.")
    ] = False,
    device: options.Device = "cpu",
    alpha: options.Alpha = None,
    enable_lora: options.EnableLora = None,
    scaling: options.Scaling = None,
    table: options.TablePath = None,
    force: options.Force = False,
    everything: Annotated[bool, Option("--all", help="Show the bins of the ECE, and all perplexities.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure how well a model with an adapter does a task.

    Exact match, likelihood, multiple choice and calibration, each with a 95 % interval by bootstrap; of several
    adapters the differences too, on the same draws of the rows. Needs loratools[models].

    \b
    Examples:
      loratools eval my_lora --base llama --data task.jsonl
      loratools eval none my_lora --base llama --data quiz.jsonl --calibration
      loratools eval my_lora my_lora.r8 --base llama --data task.jsonl
      loratools eval my_lora --base llama --data task.jsonl --ranks 1,2,4,8
    """
    from dataclasses import replace

    from loratools.errors import UsageError
    from loratools.training.evaluate import Evaluate
    from loratools.training.models import load_model, working_dtype
    from loratools.training.task import Measuring, read_task, run_task
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.opening import open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    if slices is not None and ranks is None:
        raise UsageError("--slice says how to cut to --ranks; give them too")
    if ranks is not None and (len(adapters) > 1 or adapters[0] == NONE):
        raise UsageError("--ranks cuts one adapter; give one, and not none")
    how = Evaluate(max_rows, batch, max_tokens, device, chat)
    measuring = Measuring(calibration, bins, min_count, threshold, temperature, 5, normalise, resamples, seed)
    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    options.check_device(device)
    check_exports(table=table, force=force)
    task = read_task(data, metric, max_rows)
    task.check(measuring)
    if not calibration and (bins, min_count, threshold, temperature) != (15, 1, 0.01, "crossfit"):
        raise UsageError("--bins, --min-count, --threshold and --temperature are of --calibration; give that too")
    if normalise != "none" and task.metric != "choice":
        raise UsageError("--normalise is for choices; the rows have none, or --metric is another")
    weights = open_base(Path(base)) if Path(base).is_dir() else None
    candidates, warnings = _candidates(adapters, alpha, enable_lora, scaling, weights)
    if ranks is not None:
        from loratools.training.cut import at_ranks

        whole = candidates[0].make()
        assert whole is not None  # `none` was refused
        cuts, more = at_ranks(whole, _integers(ranks), name=adapters[0], nested=slices, scaling=scaling, base=weights)
        candidates += cuts
        warnings += more
    kind = working_dtype(device) if dtype == "auto" else dtype
    shown.announce(lambda: task.cost(base, len(candidates), how))
    model, tokenizer = load_model(base, device, dtype=kind, allow_download=allow_download)
    with Progress() as progress:
        step = progress.meter(task.n_batches(tokenizer, how) * len(candidates), "batches")
        report = run_task(model, tokenizer, task, candidates, options=how, measuring=measuring, step=step)
    cut = None if ranks is None else "svd" if slices is None else slices
    report = replace(report, cut=cut, warnings=(*warnings, *report.warnings))
    write_exports(report, table=table, force=force)
    shown.show(report)


def _candidates(
    adapters: list[str],
    alpha: float | None,
    enable_lora: str | None,
    scaling: NestedScaling | None,
    base: BaseWeights | None,
) -> tuple[list[Candidate], list[str]]:
    """Every adapter, opened, and what is to be known of them."""
    from loratools.training.task import Candidate
    from loratools_cli.opening import open_adapter

    found: list[Candidate] = []
    warnings: list[str] = []
    for name in adapters:
        adapter = None
        if name != NONE:
            adapter = open_adapter(Path(name), alpha=alpha, enable_lora=enable_lora, scaling=scaling, base=base)
            warnings += adapter.warnings
        found.append(Candidate(name, lambda adapter=adapter: adapter))  # type: ignore[misc]
    return found, warnings


def _integers(text: str) -> list[int]:
    from loratools.errors import UsageError

    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--ranks {text}: give whole numbers, such as 1,2,4,8") from None
