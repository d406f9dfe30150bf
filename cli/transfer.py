"""`loratools transfer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Context, Option

from loratools_cli import options

# what two of its forms make use of, beside what every command does
_PREPARING = {
    "path", "source", "seeds", "output", "show", "temperature", "top_p", "max_input_tokens", "batch", "chat", "seed",
    "prepare_only",
}  # fmt: skip
_CARRYING = {"path", "source", "target", "output", "weights_only", "align", "texts", "page"}


def transfer(
    context: Context,
    path: options.AdapterPath,
    source: Annotated[
        str, Option("--from", metavar="BASE", help="The base it was trained on: a folder, a .gguf file.")
    ],
    target: Annotated[str | None, Option("--to", metavar="BASE", help="The base to move it to.")] = None,
    output: Annotated[Path | None, Option("--output", "-o", metavar="FOLDER", help="The PEFT folder to write.")] = None,
    seeds: Annotated[
        Path | None, Option(metavar="FILE", help="A few real inputs: .jsonl rows with a prompt. Five will do.")
    ] = None,
    samples: Annotated[int, Option(metavar="N", help="Inputs to make up and to train on.")] = 500,
    rank: Annotated[int, Option(metavar="N", help="Of the new adapter.")] = 16,
    method: Annotated[Literal["lora", "rslora", "dora"], Option(help="Its kind.")] = "lora",
    squeeze_to: Annotated[int | None, Option(metavar="N", help="Squeeze it to this rank afterwards.")] = None,
    generator: Annotated[
        str | None, Option(metavar="BASE", help="The model that makes up inputs, instead of the target.")
    ] = None,
    show: Annotated[
        Literal["inputs", "pairs"], Option(help="Show it the seeds without or with their answers.")
    ] = "inputs",
    temperature: Annotated[float, Option(metavar="T", help="Of its sampling.")] = 0.9,
    top_p: Annotated[float, Option(metavar="P", help="Of its sampling.")] = 0.95,
    passing: Annotated[
        Literal["threshold", "ratio", "none"],
        Option("--filter", help="Which inputs pass the discriminator: probable ones, by their odds, or all."),
    ] = "threshold",
    threshold: Annotated[float, Option(metavar="P", help="The least probability that an input is a real one.")] = 0.5,
    max_input_tokens: Annotated[int, Option(metavar="N", help="The longest input.")] = 64,
    max_answer_tokens: Annotated[int, Option(metavar="N", help="The longest answer.")] = 128,
    loss: Annotated[
        Literal["auto", "ce", "kl", "uld"],
        Option(
            help="The teacher's words; or also its probabilities: kl, by default where both have one vocabulary; uld."
        ),
    ] = "auto",
    loss_temperature: Annotated[
        float,
        Option("--loss-temperature", metavar="T", help="Of kl: how far the teacher's probabilities are softened."),
    ] = 2.0,
    weights: Annotated[
        Literal["none", "confidence", "robust"], Option(help="Let rows count as the teacher was sure of them.")
    ] = "none",
    learning_rate: Annotated[float, Option("--learning-rate", "--lr", metavar="R", help="Of AdamW.")] = 5e-4,
    epochs: Annotated[int, Option(metavar="N", help="Rounds over the rows, at most.")] = 3,
    batch: Annotated[int, Option(metavar="N", help="Rows in a step of training; twice as many elsewhere.")] = 8,
    held_out: Annotated[float, Option(metavar="SHARE", help="Rows that decide when training stops.")] = 0.1,
    chat: Annotated[bool, Option("--chat", help="Put prompts into the chat templates of both.")] = False,
    evaluate: Annotated[
        Path | None,
        Option(
            "--eval",
            metavar="FILE",
            help="Rows with a prompt and an answer: let all models do them, after --squeeze-to.",
        ),
    ] = None,
    work: Annotated[
        Path | None, Option(metavar="FOLDER", help="Where the stages' files lie, instead of FOLDER.transfer.")
    ] = None,
    prepare_only: Annotated[
        bool, Option("--prepare-only", help="Learn what real inputs look like, and save that with the adapter.")
    ] = False,
    kit: Annotated[
        Path | None, Option(metavar="FOLDER", help="What --prepare-only saved, where it is not with the adapter.")
    ] = None,
    seed: Annotated[int, Option(metavar="N", help="Another one makes other inputs and another start.")] = 0,
    weights_only: Annotated[
        bool, Option("--weights-only", help="Train nothing: carry it over by the weights of both bases.")
    ] = False,
    warm_start: Annotated[
        bool, Option("--warm-start", help="Train, but begin with what --weights-only would make.")
    ] = False,
    align: Annotated[
        Literal["none", "bases", "activations"],
        Option(help="For both: as it is; by singular vectors; by what both bases make of texts."),
    ] = "bases",
    texts: Annotated[
        Path | None,
        Option(metavar="FILE", help="For activations: rows with text; --warm-start takes the made-up rows."),
    ] = None,
    device: options.Device = "cpu",
    allow_download: Annotated[bool, Option("--allow-download", help="Names of models may be fetched.")] = False,
    resume: Annotated[bool, Option("--resume", help="Go on where an earlier run ended.")] = False,
    page: Annotated[
        Path | None,
        Option(
            "--report", metavar="FILE.html", help="Write a page: acceptance, diversity, agreement, curves, samples."
        ),
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Move an adapter to another base, without its training data.

    The target base is shown a few inputs and makes up others; a discriminator drops what does not look real; the source
    base with the adapter answers them; a new adapter learns the answers (Trans-LoRA). The files of each stage can be
    read, edited and resumed from. Needs loratools[models].

    \b
    Examples:
      loratools transfer my_lora --from base1 --to base2 --seeds five.jsonl -o new
      loratools transfer my_lora --from base1 --seeds all.jsonl --prepare-only
      loratools transfer my_lora --from base1 --to base2 --weights-only -o moved
      loratools transfer my_lora --from base1 --to base2 --warm-start -o new
    """
    from functools import partial

    from loratools.errors import UsageError
    from loratools.reports.pages import check_place
    from loratools.training.distil import Train
    from loratools.training.evaluate import read_rows
    from loratools.training.new_adapter import NewAdapter
    from loratools.training.transfer.cost import estimated
    from loratools.training.transfer.run import judge_of, refuse_taken, save_kit
    from loratools.training.transfer.run import transfer as run
    from loratools.training.transfer.sampling import Sampling
    from loratools.training.transfer.seed_inputs import read_seeds
    from loratools.training.transfer.settings import Transfer
    from loratools_cli.interrupts import resumable
    from loratools_cli.output import Output, say
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet)
    options.check_device(device)
    if weights_only and prepare_only:
        raise UsageError("--prepare-only is for training, and --weights-only trains nothing; choose one")
    if weights_only or prepare_only:
        options.refuse_unused(
            context, "--weights-only" if weights_only else "--prepare-only", _CARRYING if weights_only else _PREPARING
        )
    elif texts is not None:
        raise UsageError("--texts goes with --weights-only; a warm start takes the made-up rows")
    if loss_temperature != 2.0 and loss not in ("auto", "kl"):
        raise UsageError("--loss-temperature is of --loss kl; give that too")
    if threshold != 0.5 and passing != "threshold":
        raise UsageError("--threshold is of --filter threshold; leave it out")
    if align != "bases" and not (warm_start or weights_only):
        raise UsageError("--align goes with --weights-only or --warm-start")
    if page is not None:
        check_place(page, force=force or resume)
    how = Transfer(
        samples=samples,
        sampling=Sampling(temperature, top_p),
        show=show,
        max_input_tokens=max_input_tokens,
        max_answer_tokens=max_answer_tokens,
        batch=2 * batch,
        passing=passing,
        threshold=threshold,
        weighing=weights,
        held_out=held_out,
        adapter=NewAdapter(method, rank),
        train=Train(loss=loss, temperature=loss_temperature, learning_rate=learning_rate, epochs=epochs, batch=batch),
        warm_start=align if warm_start else None,
        squeeze_to=squeeze_to,
        chat=chat,
        device=device,
        seed=seed,
    )
    found = [] if seeds is None else read_seeds(seeds)
    if prepare_only:
        with Progress() as progress:
            saved = save_kit(
                path, source, found, output, how, force=force, allow_download=allow_download, meter=progress.meter
            )
        shown.show(saved)
        return
    if target is None or output is None:
        raise UsageError("name the base to move to, --to, and what to write, -o; or pass --prepare-only")
    if weights_only:
        from loratools_cli.transfer_weights import transfer_weights

        carried = transfer_weights(
            path, source, target, output, align=align, texts=texts, device=device, allow_download=allow_download,
            force=force,
        )  # fmt: skip
        if page is not None:
            from loratools.reports.weight_transfer_page import write_page as write_weight_page

            write_weight_page(carried, page, force=force)
            say(f"wrote {page}")
        shown.show(carried)
        return
    rows = [] if evaluate is None else read_rows(evaluate)
    with_kit = judge_of(path, kit) is not None
    refuse_taken(output, work, resume=resume, force=force)
    speaks = generator if found or with_kit else source  # without seeds, the source makes up inputs itself
    shown.announce(partial(estimated, source, target, how, generator=speaks, with_kit=with_kit))
    with resumable(), Progress() as progress:
        report = run(
            path,
            source,
            target,
            found,
            output,
            how,
            generator=generator,
            kit=kit,
            work=work,
            rows=rows,
            resume=resume,
            force=force,
            allow_download=allow_download,
            meter=progress.meter,
        )
    if page is not None:
        from loratools.training.transfer.page import write_page

        write_page(report, page, force=force or resume)
        say(f"wrote {page}")
    shown.show(report)
